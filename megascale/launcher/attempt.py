"""The attempts at a run on a cluster, as files in its folder, for the batch script and for people.

    python -m megascale.launcher.attempt begin RUN ...   before srun: may it start, and where does
                                                          it write? Prints settings for the shell.
    python -m megascale.launcher.attempt choose FOLDER    with spare machines: which to leave out?
    python -m megascale.launcher.attempt end FOLDER CODE  after srun: how did it end, once more?
    python -m megascale.launcher.attempt exclude RUN      before a requeue: without which machines?

An attempt is one start of a job by Slurm. Its folder RUN/attempts/NUMBER holds begin.json (job,
nodes, newest checkpoint), started.json and outcome.json of rank 0, notes of ranks that failed,
`asked` (why the batch script wanted it to end) and end.json. Neither torch nor pydantic is loaded:
these commands run in every batch script, and take 0.2 s of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.file_lock import FileLock
from megascale.launcher.bad_nodes import (
    add_bad_nodes,
    choose_nodes,
    nodes_to_exclude,
    read_bad_nodes,
    short,
)
from megascale.launcher.ends import KINDS, REQUEUE_CODE, End, classify
from megascale.launcher.environment import ATTEMPT_DIR
from megascale.launcher.failure import read_notes
from megascale.launcher.meeting import candidate_ports, host_names, listen
from megascale.launcher.preflight import Facts, compare
from megascale.launcher.slurm_client import Slurm

LOCK_WAIT_S = 120.0
_SEEN_S = 10.0
NOTHING_TO_DO = 10
"""Exit code of `begin` when the run is over."""
STOP_NAME = "STOP"
BATCH_STOP = "by the batch script"
"""First words in a STOP file that the batch script made, so that they differ from a person's."""
_FOLDER = "attempts"
_CHECKPOINT = re.compile(r"^step_(\d{8,})$")
_LOG_BYTES = 1 << 18


@dataclass(frozen=True)
class Begin:
    """The start of an attempt.

    Attributes:
        submission: names what was submitted together; a requeued job and a chain are one.
        newest_step: step of the newest checkpoint at the start; -1: none.
        log: the batch script's output, and log_start where in it this attempt begins, in bytes.
    """

    submission: str
    job: str
    restart: int
    nodes: str
    newest_step: int
    log: str
    log_start: int
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Attempt:
    """What is known of one attempt; `end` is None while it goes on, or if it was cut off."""

    folder: Path
    begin: Begin
    end: End | None


def attempts(run: Path) -> list[Attempt]:
    """All attempts at a run, oldest first."""
    found = []
    for folder in sorted((run / _FOLDER).glob("[0-9]*")):
        begin = read_json(folder / "begin.json")
        if begin is None:
            continue
        end = read_json(folder / "end.json")
        found.append(Attempt(folder, Begin(**begin), End(**end) if end else None))
    return found


def begin(run: Path, now: Begin, most: int) -> tuple[Path | None, End | None]:
    """Open an attempt, or say why there is nothing to do.

    Args:
        now: this start.
        most: attempts without a newer checkpoint after which the run is given up.

    Returns:
        (folder of the new attempt, None), or (None, how the run ended).
    """
    earlier = [a for a in attempts(run) if a.begin.submission == now.submission]
    over = _over(run, earlier, now, most)
    folder = run / _FOLDER / f"{_last_number(run) + 1:04d}"
    if over is None or over.kind == "no progress":
        folder.mkdir(parents=True)
        write_json(folder / "begin.json", asdict(now))
    if over is not None:
        if over.kind == "no progress":
            write_json(folder / "end.json", asdict(over))
        return None, over
    return folder, None


def _last_number(run: Path) -> int:
    """Of the newest attempt's folder; people tidy up, so it may not be their number."""
    names = (path.name for path in (run / _FOLDER).glob("[0-9]*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _over(run: Path, earlier: Sequence[Attempt], now: Begin, most: int) -> End | None:
    stop = run / STOP_NAME
    if stop.exists():
        text = stop.read_text(errors="replace")
        stop.unlink(missing_ok=True)
        if not text.startswith(BATCH_STOP):
            return End("user stop", f"the file {stop} was there at the start")
    # of a chain: what ended one link ends all, unless the next may do better
    for attempt in earlier:
        kind = attempt.end.kind if attempt.end else "node failure"
        if attempt.end and not KINDS[kind].again:
            return attempt.end
    stuck = []
    for attempt in reversed(earlier):
        if attempt.begin.newest_step != now.newest_step:
            break
        stuck.append(attempt)
    if len(stuck) < most:
        return None
    lines = [f"{len(stuck)} attempts began at step {now.newest_step} and left no newer checkpoint:"]
    for attempt in reversed(stuck):
        kind = attempt.end.kind if attempt.end else "node failure"
        text = attempt.end.text.splitlines()[0] if attempt.end else "cut off without a word"
        lines.append(f"  attempt {attempt.folder.name} on {attempt.begin.nodes}: {kind}: {text}")
    return End("no progress", "\n".join(lines))


def end(folder: Path, code: int, state: str = "RUNNING") -> End:
    """Judge an attempt that is over, and write it down.

    Args:
        code: srun's exit code.
        state: of the job, by Slurm, see `classify`.

    Raises:
        UserError: there is no such attempt any more.
    """
    found = read_json(folder / "begin.json")
    if found is None:
        raise UserError(
            f"{folder} is gone, or unreadable",
            rule="a run's folder stays where it is while the run goes on",
            remedy="bring it back and submit the run again: it goes on from what is there",
        )
    start, asked = Begin(**found), folder / "asked"
    judged = classify(
        code,
        read_json(folder / "outcome.json"),
        asked.read_text().strip() if asked.exists() else "",
        read_notes(folder),
        _log_of(start),
        state,
    )
    try:
        write_json(folder / "end.json", asdict(judged))
    except OSError as error:  # the verdict counts, even where it cannot be kept
        print(f"warning: {folder}/end.json: {error.strerror}", file=sys.stderr, flush=True)
    return judged


def newest_step(checkpoints: str) -> int:
    """Step of the newest complete checkpoint in a folder; -1: none.

    A URL is listed with the program's own reader of checkpoints, which takes some seconds to load.
    """
    if "://" in checkpoints:
        from megascale.checkpoint.manager import CheckpointFolder

        return max(CheckpointFolder(checkpoints).steps(), default=-1)
    steps = [-1]
    for path in Path(checkpoints).glob("step_*/manifest.json"):
        match = _CHECKPOINT.match(path.parent.name)
        steps += [int(match.group(1))] if match else []
    return max(steps)


# What the ranks write ---------------------------------------------------------------------------


def attempt_folder(environment: Mapping[str, str] | None = None) -> Path | None:
    """The folder of the attempt that this process belongs to; None without a batch script."""
    name = (os.environ if environment is None else environment).get(ATTEMPT_DIR)
    return Path(name) if name else None


def check_folder_is_seen(wait_s: float = _SEEN_S) -> None:
    """Refuse a machine on which the run's folder is not the one of the batch script.

    Raises:
        UserError: it is not there.
    """
    folder, deadline = attempt_folder(), time.monotonic() + wait_s
    while folder is not None and not folder.is_dir():  # network file systems may be seconds late
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} does not see {folder}",
                rule="run.output_dir is one folder that all machines share (and, with containers, "
                "that is mounted)",
                remedy="choose a run.output_dir on a shared file system, or mount it there",
            )
        time.sleep(0.5)


def write_started(step: int, world_size: int) -> None:
    """Rank 0: training begins at this step."""
    _write("started.json", {"step": step, "world_size": world_size, "time_s": time.time()})


def write_outcome(step: int, finished: bool, reason: str) -> None:
    """Rank 0: the run came to a good end, by itself or because it was asked to.

    Args:
        reason: why it stopped before its last step; "" if it did not.
    """
    kind = "finished" if finished else "stopped"
    _write("outcome.json", {"kind": kind, "step": step, "reason": reason, "time_s": time.time()})


def _write(name: str, content: Mapping[str, Any]) -> None:
    folder = attempt_folder()
    if folder is not None:
        write_json(folder / name, content)


# Files ------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or a half (a node died while writing)."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object so that a reader sees all of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _log_of(start: Begin) -> str:
    try:
        with open(start.log, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start.log_start, size - _LOG_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


# The commands -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megascale.launcher.attempt")
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("begin")
    first.add_argument("run", type=Path)
    first.add_argument("--submission", required=True)
    first.add_argument("--checkpoints", required=True)
    first.add_argument("--most-attempts", type=int, default=5)
    first.add_argument("--nodes", type=int, required=True)
    first.add_argument("--log", default="")
    middle = commands.add_parser("choose")
    middle.add_argument("folder", type=Path)
    middle.add_argument("--nodes", type=int, required=True)
    without = commands.add_parser("exclude")
    without.add_argument("run", type=Path)
    without.add_argument("--nodes", type=int, required=True)
    last = commands.add_parser("end")
    last.add_argument("folder", type=Path)
    last.add_argument("code", type=int)
    last.add_argument("--state", default="RUNNING")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands of the batch script; returns the exit code."""
    asked = _parser().parse_args(arguments)
    commands = {"begin": _begin, "choose": _choose, "end": _end, "exclude": _exclude}
    try:
        return commands[asked.command](asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written to
        refused = UserError(
            f"{error.filename}: {error.strerror}",
            rule="the batch script keeps a record of each attempt in the run's folder",
            remedy="free space, or mend the folder, and submit the run again",
        )
        print(f"error: {refused}", file=sys.stderr, flush=True)
        return KINDS["error"].code


def _end(asked: argparse.Namespace) -> int:
    judged = end(asked.folder, asked.code, asked.state)
    kind = KINDS[judged.kind]
    print(f"megascale: {judged.kind}. {kind.meaning}\n{judged.text}", flush=True)
    return REQUEUE_CODE if kind.again else kind.code


def _begin(asked: argparse.Namespace) -> int:
    env = os.environ
    size = Path(asked.log).stat().st_size if asked.log and Path(asked.log).exists() else 0
    now = Begin(
        submission=asked.submission,
        job=env.get("SLURM_JOB_ID", ""),
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        nodes=env.get("SLURM_JOB_NODELIST", ""),
        newest_step=newest_step(asked.checkpoints),
        log=asked.log,
        log_start=size,
    )
    _wait_for_folder(asked.run, now)
    folder, over = begin(asked.run, now, asked.most_attempts)
    if over is not None:
        kind = KINDS[over.kind]
        print(f"megascale: {over.kind}. {kind.meaning}\n{over.text}", file=sys.stderr, flush=True)
        return kind.code or NOTHING_TO_DO
    assert folder is not None
    for line in shell_settings(asked.run, folder, now, asked.nodes):
        print(line)
    return 0


def _choose(asked: argparse.Namespace) -> int:
    """After machines were measured: leave the worst out, and remember outliers."""
    run = asked.folder.parents[1]
    now = Begin(**(read_json(asked.folder / "begin.json") or {}))
    found = [read_json(path) for path in (asked.folder / "machines").glob("*.json")]
    findings = compare([Facts(**facts) for facts in found if facts])
    for finding in findings:
        print(f"megascale: {finding}", file=sys.stderr)
    silent = [name for name in host_names(now.nodes) if name not in _seconds(asked.folder)]
    for name in silent:
        print(f"megascale: {name}: did not answer", file=sys.stderr)
    add_bad_nodes(run, [*silent, *sorted({f.host for f in findings if f.is_bad_node})])
    for line in shell_settings(run, asked.folder, now, asked.nodes):
        print(line)
    return 0


def _exclude(asked: argparse.Namespace) -> int:
    if not read_bad_nodes(asked.run):
        return 0
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    names = [node["name"] for node in Slurm().nodes(partition)]
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", asked.nodes))
    try:
        print(",".join(nodes_to_exclude(asked.run, names, allocated, asked.nodes)))
    except UserError as error:  # the last attempt ends the run
        print(f"megascale: {error}", file=sys.stderr, flush=True)
        last = attempts(asked.run)[-1]
        text = f"{error}\n{last.end.text if last.end else ''}"
        write_json(last.folder / "end.json", asdict(End("bad node", text)))
        return KINDS["bad node"].code
    return 0


def shell_settings(run: Path, folder: Path, now: Begin, num_nodes: int) -> list[str]:
    """What the batch script evaluates: folder, machines to use, head and a port for torchrun."""
    use = choose_nodes(host_names(now.nodes), read_bad_nodes(run), _seconds(folder), num_nodes)
    identity = f"torchrun {now.job}.{now.restart}"
    with listen(candidate_ports(identity)) as listener:
        port = listener.getsockname()[1]
    return [
        f"export {ATTEMPT_DIR}={shlex.quote(str(folder.resolve()))}",
        f"export MASTER_ADDR={shlex.quote(use[0])}",
        f"use_nodes={shlex.quote(','.join(use))}",
        f"torchrun_port={port}",
    ]


def _seconds(folder: Path) -> dict[str, float]:
    """What `megascale doctor --record` measured on each machine."""
    found = {path.stem: read_json(path) for path in (folder / "machines").glob("*.json")}
    return {short(name): float(facts["product_s"]) for name, facts in found.items() if facts}


def _wait_for_folder(run: Path, now: Begin, wait_s: float = LOCK_WAIT_S) -> None:
    """Wait for the end of an earlier attempt's ranks that still hold the run's folder.

    A rank behind a cut cable may live on, and so may its lock. Slurm starts an attempt only when
    the one before is over, so such a lock is taken away: its holder sees that, and writes no more.
    """
    deadline = time.monotonic() + wait_s
    told = False
    path = run / ".run.lock"
    while path.exists():
        try:
            FileLock(path, lambda holder: _held(run, holder)).release()
            return
        except UserError as error:
            holder = (read_json(path) or {}).get("host", "")
            if holder and _is_lost(holder, run, now):
                path.unlink(missing_ok=True)
                print(f"megascale: {run} is taken over from {holder}", file=sys.stderr, flush=True)
                return
            if not told:
                print(f"megascale: waiting, {error}", file=sys.stderr, flush=True)
                told = True
            if time.monotonic() > deadline:
                return  # the ranks will say so
        time.sleep(1)


def _held(run: Path, holder: str) -> UserError:
    return UserError(
        f"{run} is held by {holder}",
        rule="one attempt at a time writes a run's folder",
        remedy="it is waited for; end that process if it is none of this run's",
    )


def _is_lost(host: str, run: Path, now: Begin) -> bool:
    """Whether a machine was an earlier attempt's of the same submission, and is not this one's."""

    def has_it(nodes: str) -> bool:
        return short(host) in map(short, host_names(nodes))

    earlier = [a.begin.nodes for a in attempts(run) if a.begin.submission == now.submission]
    return any(map(has_it, earlier)) and not has_it(now.nodes)


if __name__ == "__main__":
    sys.exit(main())
