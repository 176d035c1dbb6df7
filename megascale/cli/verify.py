"""`megascale verify layout`: prove on real processes that layouts are the same training."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.cli.process import distributed_process
from megascale.config.load import load_config
from megascale.config.problems import ConfigError
from megascale.config.schema import Config
from megascale.errors import UserError
from megascale.launcher.failure import read_notes
from megascale.launcher.local import launch_local
from megascale.verification.layout import (
    SINGLE,
    Layout,
    legal_layouts,
    pairwise,
    parse_layouts,
)

if TYPE_CHECKING:
    from megascale.verification.report import Row

app = typer.Typer(help="Prove that layouts and resumes are the same training.")

# The config's own optimizer, and SGD without clipping: Adam and clipping hide scale.
SGD = ("optimizer.name=sgd", "optimizer.lr=0.02", "optimizer.grad_clip=0.0")
SGD_RESETS = ("optimizer.betas=[0.9, 0.95]", "optimizer.eps=1.0e-8")
VARIANTS = ("config", "sgd")
# A wrong scale shows at once; hundreds of unclipped steps would only amplify the rounding of bf16.
SGD_STEPS = 20

_STOPPED = (130, 143)
"""Exit codes of ranks that were interrupted or asked to end: no verdict on their layout."""

# Divided by the root of its own noise, a gradient of rounding moves a weight by a whole step, in a
# direction that rounding decides: with a smaller eps the single process differs from itself.
LEAST_EPS = 1e-6
_HAVE_EPS = ("adamw", "lamb", "muon")


@app.command()
def layout(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[
        str,
        typer.Option(
            help='"auto": every legal one; "pairwise": a few of them with every pair of choices; '
            'or layouts such as "dp=4;tp=2,dp=2,zero=1".'
        ),
    ] = "auto",
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes of the layouts of auto and pairwise.")
    ] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare layouts with the single process, step by step; exit code 0 only if all agree."""
    base = list(overrides or ())
    chosen = _choose(config, base, layouts, nproc)
    console = Console(stderr=as_json)
    console.print(f"{len(chosen)} layouts, {steps} steps, {', '.join(VARIANTS)} optimizer")
    folder = Path(tempfile.mkdtemp(prefix="megascale-verify-"))
    try:
        rows = _run_all(config, base, chosen, steps, device, folder, console)
        rows = _settle(rows, config, base, steps, device, folder / "fp64", console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print(rows, as_json, console)
    if not all(row.agrees for row in rows):
        raise typer.Exit(1)


@app.command("ranks", hidden=True)
def ranks(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[str, typer.Option()] = "",
    steps: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
    folder: Annotated[Path, typer.Option()] = Path(),
) -> None:
    """What each process of a layout runs; started by `verify layout`."""
    from megascale.verification.record import record_run

    timeout_s = _load(config, overrides or (), SINGLE).parallel.collective_timeout_s
    with distributed_process(device, timeout_s) as place:
        for chosen in parse_layouts(layouts):
            for variant in VARIANTS:
                changes = _changes(config, overrides or (), variant)
                checked = _load(config, [*(overrides or ()), *changes], chosen)
                count = min(steps, SGD_STEPS) if variant == "sgd" else steps
                record_run(checked, place, count, folder / str(chosen) / variant)
            (folder / str(chosen) / "done").touch()


@app.command()
def resume(
    config: ConfigFile,
    overrides: Overrides = None,
    source: Annotated[
        str, typer.Option("--from", help='Layout of the killed run, e.g. "tp=2,dp=2,zero=1".')
    ] = "dp=1",
    target: Annotated[
        str, typer.Option("--to", help="Layout that continues it; the same by default.")
    ] = "",
    at_step: Annotated[int, typer.Option(min=1, help="Step after which is saved.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare after it.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare a run that was killed and continued elsewhere with the one that never stopped."""
    base = list(overrides or ())
    origin, goal = _one_layout(source), _one_layout(target or source)
    checked = [_load(config, base, one) for one in (origin, goal)]
    folder = Path(tempfile.mkdtemp(prefix="megascale-verify-"))
    console = Console()
    console.print(
        f"from {origin} to {goal}: save after step {at_step}, kill, continue {steps} steps"
    )
    try:
        for part, one in (("straight", origin), ("killed", origin), ("resumed", goal)):
            arguments = ["verify", "resume-ranks", str(config), *base, "--part", part]
            arguments += ["--layout", str(one), "--at-step", str(at_step)]
            arguments += ["--steps", str(at_step + steps), "--device", device]
            code = launch_local(
                [*arguments, "--folder", str(folder)], one.world_size, folder / "logs" / part
            )
            if not _ended_as_meant(part, code, folder):
                console.print(f"the {part} run ended with code {code}")
                raise typer.Exit(2)
            if part == "killed":
                console.print("that was meant: it was killed after its save")
        same = _report_resume(folder, origin == goal, checked[0].precision.dtype, console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not same:
        raise typer.Exit(1)


def _ended_as_meant(part: str, code: int, folder: Path) -> bool:
    """Whether a part of `verify resume` came to its end: the killed one, to its save."""
    from megascale.checkpoint.manager import CheckpointFolder

    if part != "killed":
        return code == 0
    return code != 0 and bool(CheckpointFolder(str(folder / "checkpoints")).steps())


def _one_layout(text: str) -> Layout:
    found = parse_layouts(text)
    if len(found) != 1:
        raise UserError(
            f"layout {text!r}",
            rule="a resume goes from one layout to one layout",
            remedy='for example --from "tp=2,dp=2" --to "dp=1"',
        )
    return found[0]


def _report_resume(folder: Path, same_layout: bool, dtype: str, console: Console) -> bool:
    from megascale.verification.compare import TOLERANCES
    from megascale.verification.resume import compare_resume, read_steps

    expected = read_steps(folder / "straight.json")
    found = read_steps(folder / "resumed.json")
    limit = TOLERANCES[dtype].loss
    verdict = compare_resume(expected, found, same_layout=same_layout, limit=limit)
    exact = "bit-identical" if verdict.identical else "not bit-identical"
    console.print(
        f"{len(found)} steps: loss {verdict.loss:.1e}, gradient norm {verdict.norm:.1e} "
        f"(largest relative differences), {exact}; samples and learning rates compared"
    )
    if verdict.problem:
        console.print(f"DIFFERENT: {verdict.problem}", markup=False, soft_wrap=True)
    return not verdict.problem


@app.command("resume-ranks", hidden=True)
def resume_ranks(
    config: ConfigFile,
    overrides: Overrides = None,
    part: Annotated[str, typer.Option()] = "",
    layout: Annotated[str, typer.Option()] = "",
    at_step: Annotated[int, typer.Option()] = 1,
    steps: Annotated[int, typer.Option()] = 2,
    device: Annotated[str, typer.Option()] = "cpu",
    folder: Annotated[Path, typer.Option()] = Path(),
) -> None:
    """What each process of one part of `verify resume` runs."""
    from megascale.verification.resume import killed_run, resumed_run, straight_run

    checked = _load(config, list(overrides or ()), _one_layout(layout))
    with distributed_process(device, checked.parallel.collective_timeout_s) as place:
        saved = folder / "checkpoints"
        if part == "straight":
            straight_run(checked, place, steps, folder / "straight.json")
        elif part == "killed":
            killed_run(checked, place, at_step, saved)
        else:
            resumed_run(checked, place, steps, saved, folder / "resumed.json")


def _changes(config: Path, overrides: Sequence[str], variant: str) -> tuple[str, ...]:
    """What a variant changes in the config."""
    if variant == "sgd":
        return (*SGD_RESETS, *SGD)
    optimizer = _load(config, overrides, SINGLE).optimizer
    raised = optimizer.name in _HAVE_EPS and optimizer.eps < LEAST_EPS
    return (f"optimizer.eps={LEAST_EPS:.1e}",) if raised else ()


def _load(config: Path, overrides: Sequence[str], chosen: Layout) -> Config:
    everything = [*overrides, *chosen.overrides()]
    return load_config(config, everything, checks=all_checks(), world_size=chosen.world_size)


def _choose(config: Path, overrides: list[str], text: str, nproc: int) -> list[Layout]:
    """The layouts to verify, each checked; the single process must be legal too."""
    _load(config, overrides, SINGLE)
    if text in ("auto", "pairwise"):
        legal = legal_layouts(nproc, lambda one: _load(config, overrides, one))
        return list(legal) if text == "auto" else pairwise(legal)
    chosen = parse_layouts(text)
    for one in chosen:
        _load(config, overrides, one)
    return chosen


def _run_all(
    config: Path,
    overrides: list[str],
    chosen: list[Layout],
    steps: int,
    device: str,
    folder: Path,
    console: Console,
) -> list[Row]:
    """Start the processes of the reference, then those of the layouts, and compare."""
    from megascale.verification.report import Row

    def start(group: Sequence[Layout]) -> int:
        arguments = ["verify", "ranks", str(config), *overrides]
        arguments += ["--layouts", ";".join(map(str, group)), "--steps", str(steps)]
        arguments += ["--device", device, "--folder", str(folder)]
        return launch_local(arguments, group[0].world_size, folder / "logs")

    if start([SINGLE]):
        raise typer.Exit(2)
    rows = []
    for size in sorted({one.world_size for one in chosen}):
        waiting = [one for one in chosen if one.world_size == size]
        while waiting:
            # ranks are started once for many layouts; after a failure, anew for the rest
            code = start(waiting)
            if code in _STOPPED:
                raise typer.Exit(code)
            for one in list(waiting):
                if not (folder / str(one) / "done").exists():
                    break
                rows.append(_compare(config, overrides, one, folder))
                shutil.rmtree(folder / str(one), ignore_errors=True)
                waiting.remove(one)
            if code and waiting:
                failure = _failure(folder / "logs", size)
                failure = failure or f"its processes ended with code {code}"
                rows.append(Row(waiting.pop(0), {}, failure))
    return rows


def _settle(
    rows: list[Row],
    config: Path,
    overrides: list[str],
    steps: int,
    device: str,
    folder: Path,
    console: Console,
) -> list[Row]:
    """Run in fp64 what is off a little in fp32: rounding vanishes there, a mistake does not."""
    exact = [*overrides, "precision.dtype=fp64"]
    doubtful = [
        row.layout
        for row in rows
        if row.may_be_rounding and _same_engine(config, overrides, exact, row.layout)
    ]
    if not doubtful:
        return rows
    console.print(f"{len(doubtful)} layouts are off a little: once more in fp64")
    settled = {
        row.layout: row for row in _run_all(config, exact, doubtful, steps, device, folder, console)
    }
    return [replace(row, exact=settled.get(row.layout)) for row in rows]


def _same_engine(
    config: Path, overrides: Sequence[str], exact: Sequence[str], chosen: Layout
) -> bool:
    """Whether fp32 is what was compared, and fp64 runs on the engine that it ran on."""
    from megascale.engine.capabilities import choose_engine

    before = _load(config, overrides, chosen)
    if before.precision.dtype != "fp32":
        return False
    try:
        after = _load(config, exact, chosen)
    except ConfigError:
        return False
    return choose_engine(before) == choose_engine(after)


def _failure(log_dir: Path, size: int) -> str:
    """What the rank that failed first noted; "" for one that died without a word."""
    notes = read_notes(log_dir, size)
    first = min(notes.values(), key=lambda note: (note.lost_peer, note.time_s), default=None)
    return "" if first is None else f"rank {first.rank}: {first.text}"


def _compare(config: Path, overrides: list[str], chosen: Layout, folder: Path) -> Row:
    from megascale.verification.compare import TOLERANCES, compare
    from megascale.verification.record import read_record
    from megascale.verification.report import Row

    verdicts, costs = {}, {}
    for variant in VARIANTS:
        changes = _changes(config, overrides, variant)
        checked = _load(config, [*overrides, *changes], chosen)
        tolerance = TOLERANCES[checked.precision.dtype]
        found = read_record(folder / str(chosen) / variant, chosen.world_size)
        expected = read_record(folder / str(SINGLE) / variant, 1)
        with contextlib.closing(found), contextlib.closing(expected):
            train = checked.train
            micro = train.global_batch_size // (train.micro_batch_size * chosen.dp)
            lr = checked.optimizer.lr
            verdicts[variant] = compare(found, expected, chosen, tolerance, micro, lr)
            costs[variant] = found.sent, found.held
    sent, held = costs["config"]
    return Row(chosen, verdicts, sent=sent, held=held)


def _print(rows: list[Row], as_json: bool, console: Console) -> None:
    from megascale.verification.report import as_json as to_json
    from megascale.verification.report import explain, table

    if as_json:
        typer.echo(json.dumps(to_json(rows), indent=1))
        return
    console.print(table(rows))
    for row in rows:
        for line in explain(row):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    same = sum(row.agrees for row in rows)
    console.print(f"{same} of {len(rows)} layouts are the same training as the single process")
