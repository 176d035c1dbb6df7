"""`megascale jobs status | logs | stop | cancel | why`: runs on a cluster, by their name."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megascale.errors import UserError
from megascale.launcher.attempt import STOP_NAME, Attempt, attempts, read_json
from megascale.launcher.bad_nodes import read_bad_nodes
from megascale.launcher.ends import KINDS
from megascale.launcher.slurm_client import Job, Slurm

app = typer.Typer(help="Look at and end runs on a Slurm cluster.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its output folder.")]
_LABEL = re.compile(r"^\s*(\d+): ?")
_POLL_S = 0.5
_AT_WORK = ("RUNNING", "SUSPENDED", "COMPLETING")
_ASK_S = 5.0  # the controller is asked less often than the file


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Default: all runs.")] = None,
) -> None:
    """Jobs, attempts and the last step of a run."""
    can_do_without = run is not None and shutil.which("squeue") is None  # a folder tells much
    jobs = [] if can_do_without else [job for job in Slurm().jobs() if job.run]
    if run is None:
        for job in jobs:
            typer.echo(_job_line(job))
        return
    folder = _folder(run, jobs)
    for job in _of(folder, jobs):
        typer.echo(_job_line(job))
    for attempt in attempts(folder):
        typer.echo(_attempt_line(attempt))
    last = _last_metrics(folder)
    if last is not None:
        loss = last["loss"]
        typer.echo(f"last step {last['step']}, loss {'nan' if loss is None else f'{loss:.4f}'}")
    bad = read_bad_nodes(folder)
    if bad:
        typer.echo(f"machines left out: {', '.join(bad)}")


@app.command()
def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the run is over.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="This rank only (torchrun: this machine).")
    ] = None,
) -> None:
    """What the newest job of a run printed."""
    slurm = Slurm() if shutil.which("squeue") else None
    folder = _folder(run, _known(slurm))
    paths = sorted((folder / "logs").glob("slurm_*.out"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(
            f"{folder} has no log of a job yet",
            rule="a job writes its log when it starts",
            remedy=f"megascale jobs status {run} tells why it waits",
        )
    for line in _lines(paths[-1], follow, slurm, folder):
        match = _LABEL.match(line)
        if rank is None:
            typer.echo(line)
        elif match and int(match.group(1)) == rank:
            typer.echo(line[match.end() :])


@app.command()
def stop(run: Run) -> None:
    """Save after the step that is running and end; jobs that wait are cancelled."""
    slurm = Slurm()
    jobs = slurm.jobs()
    folder = _folder(run, jobs)
    ours = _alive(folder, jobs, run)
    waiting = [job.number for job in ours if job.state == "PENDING"]
    if len(waiting) < len(ours):
        (folder / STOP_NAME).touch()
        typer.echo(f"{folder.name} saves and ends after its next step")
    if waiting:
        slurm.cancel(waiting)
        typer.echo(f"cancelled what waited: {', '.join(waiting)}")


@app.command()
def cancel(run: Run) -> None:
    """End all jobs of a run; what runs gets SIGTERM first, on which it saves."""
    slurm = Slurm()
    jobs = slurm.jobs()
    folder = _folder(run, jobs)
    numbers = [job.number for job in _alive(folder, jobs, run)]
    slurm.cancel(numbers)
    typer.echo(f"cancelled {', '.join(numbers)}")


@app.command()
def why(run: Run) -> None:
    """How the last attempt ended, and what to do; with the first failing rank's traceback."""
    slurm = Slurm() if shutil.which("squeue") else None
    jobs = _known(slurm)
    folder = _folder(run, jobs)
    done = attempts(folder)
    ours = _of(folder, jobs)
    alive = [job for job in ours if not job.is_over]
    for job in alive:
        text = f"job {job.number} is {job.state.lower()}"
        typer.echo(text + (f": it waits for {job.reason}" if job.state == "PENDING" else ""))
    if not done:
        over = [f"job {job.number} is {job.state.lower()}" for job in ours if job.is_over]
        gone = f" ({', '.join(over)}), or {folder}/attempts is gone" if over else ""
        typer.echo(f"no attempt has begun{gone}")
        return
    last = done[-1]
    if last.end is None and any(job.state in _AT_WORK for job in alive):
        typer.echo(_attempt_line(last))
        done = done[:-1]
        if not done:
            return
        last = done[-1]
        typer.echo("the attempt before:")
    typer.echo(_attempt_line(last))
    if last.end is not None:
        typer.echo(f"{KINDS[last.end.kind].meaning}\n{last.end.text}")
    else:
        state = next((job.state for job in ours if job.number == last.begin.job), "")
        typer.echo(_verdict(last) or _cut_off(state, read_json(last.folder / "outcome.json")))


def _verdict(attempt: Attempt) -> str:
    """What the batch script printed of an end that it could not keep, on a full disk; or ""."""
    try:
        printed = Path(attempt.begin.log).read_bytes()[attempt.begin.log_start :]
    except OSError:
        return ""
    pattern = rf"^megascale: ({'|'.join(KINDS)})\. .*"
    found = re.search(pattern, printed.decode(errors="replace"), re.M | re.S)
    return found.group().split("\nmegascale: 2")[0] if found else ""  # not the next attempt's


def _cut_off(state: str, outcome: Mapping[str, Any] | None) -> str:
    """Why an attempt may have ended without a word, from the state that Slurm gives its job.

    Args:
        outcome: what rank 0 wrote at a good end; None: nothing.
    """
    if outcome is not None:
        how = "was cancelled" if state == "CANCELLED" else "ended"
        return f"It {how} after it had saved at step {outcome['step']}."
    if state == "TIMEOUT":
        return "Its time was over before it had saved: a longer --lead gives it more."
    if state == "CANCELLED":
        return "It was cancelled."
    return (
        f"{KINDS['node failure'].meaning}\nThe machine that ran the batch script ended without a "
        f"word{f' (Slurm: {state})' if state else ''}."
    )


def _known(slurm: Slurm | None) -> list[Job]:
    """Slurm's jobs; none where there is no Slurm: a run's folder alone tells much."""
    return slurm.jobs() if slurm else []


def _folder(run: str, jobs: Sequence[Job]) -> Path:
    """The output folder of a run.

    Raises:
        UserError: neither a folder nor a job has this name.
    """
    for job in reversed(jobs):
        if job.run and job.name == run:
            return Path(job.run)
    for path in (Path(run), Path("runs") / run):
        if (path / "attempts").is_dir() or (path / "pretrain.sbatch").exists():
            return path.absolute()
    names = sorted({job.name for job in jobs if job.run})
    raise UserError(
        f"no run {run}",
        rule="RUN is the name of a job that Slurm remembers, or the folder of a submitted run",
        remedy=f"known are {', '.join(names)}" if names else "give its run.output_dir",
    )


def _of(folder: Path, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.run and Path(job.run).resolve() == folder.resolve()]


def _alive(folder: Path, jobs: Sequence[Job], run: str) -> list[Job]:
    found = [job for job in _of(folder, jobs) if not job.is_over]
    if not found:
        raise UserError(
            f"run {run} has no job that runs or waits",
            rule="only such a job can be ended",
            remedy=f"megascale jobs why {run} tells how it ended",
        )
    return found


def _job_line(job: Job) -> str:
    waits = f" ({job.reason})" if job.state == "PENDING" else ""
    restarts = f", {job.restarts} restarts" if job.restarts else ""
    return f"job {job.number}  {job.name}  {job.state.lower()}{waits}  {job.nodes}{restarts}"


def _attempt_line(attempt: Attempt) -> str:
    start = attempt.begin
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time_s))
    started = read_json(attempt.folder / "started.json")
    step = f"from step {started['step']}" if started else "before its first step"
    kind = attempt.end.kind if attempt.end else "no end"
    return f"attempt {attempt.folder.name}  job {start.job}  {at}  {start.nodes}  {step}  {kind}"


def _last_metrics(folder: Path) -> dict[str, float] | None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            values: dict[str, float] = json.loads(line)
        except ValueError:  # half a line: it is being written
            continue
        return values
    return None


def _lines(path: Path, follow: bool, slurm: Slurm | None, folder: Path) -> Iterator[str]:
    """The lines of a log; with `follow` until no job of the run is alive."""
    with open(path, errors="replace") as stream:
        rest, asked, over = "", 0.0, not follow or slurm is None
        while True:
            if not over and slurm is not None and time.monotonic() - asked > _ASK_S:
                over = all(job.is_over for job in _of(folder, slurm.jobs()))
                asked = time.monotonic()
            while text := stream.readline():
                rest += text
                if rest.endswith("\n"):
                    yield rest[:-1]
                    rest = ""
            if over:
                break
            time.sleep(_POLL_S)
        if rest:
            yield rest
