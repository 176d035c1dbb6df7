"""`megascale verify layout`: prove on real processes that layouts are the same training."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from megascale.cli.config import ConfigFile, Overrides
from megascale.cli.process import distributed_process, entry_of_ranks
from megascale.cli.verify_runs import (
    SGD_STEPS,
    VARIANTS,
    Verification,
    changes,
    done_mark,
    load,
)
from megascale.errors import UserError
from megascale.launcher.environment import process_info
from megascale.launcher.forked import Entry, can_fork
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

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    folder = Path(tempfile.mkdtemp(prefix="megascale-verify-"))
    try:
        entry = _entry(device, chosen)
        rows = Verification(config, tuple(base), steps, device, folder, say, entry).run(chosen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print(rows, as_json, console)
    if not all(row.agrees for row in rows):
        raise typer.Exit(1)


@app.command("ranks", hidden=True)
def ranks(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[Path, typer.Option()] = Path(),
    steps: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
    folder: Annotated[Path, typer.Option()] = Path(),
) -> None:
    """What each process of some layouts runs; started by `verify layout`."""
    from megascale.verification.record import record_run

    base = list(overrides or ())
    settings = {variant: changes(config, base, variant) for variant in VARIANTS}
    timeout_s = load(config, base, SINGLE).parallel.collective_timeout_s
    modules = 0
    with distributed_process(device, timeout_s) as place:
        rank = process_info().rank
        for chosen in parse_layouts(layouts.read_text()):
            for variant in VARIANTS:
                if len(sys.modules) > modules:  # what imports made is never garbage
                    gc.freeze()
                    modules = len(sys.modules)
                checked = load(config, [*base, *settings[variant]], chosen)
                sgd = variant == "sgd"
                count = min(steps, SGD_STEPS) if sgd else steps
                out = folder / str(chosen) / variant
                record_run(checked, place, count, out, count_sent=not sgd)
            done_mark(folder, chosen, rank).touch()


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
    checked = [load(config, base, one) for one in (origin, goal)]
    folder = Path(tempfile.mkdtemp(prefix="megascale-verify-"))
    console = Console()
    console.print(
        f"from {origin} to {goal}: save after step {at_step}, kill, continue {steps} steps"
    )
    try:
        entry = _entry(device, (origin, goal))
        for part, one in (("straight", origin), ("killed", origin), ("resumed", goal)):
            arguments = ["verify", "resume-ranks", str(config), *base, "--part", part]
            arguments += ["--layout", str(one), "--at-step", str(at_step)]
            arguments += ["--steps", str(at_step + steps), "--device", device]
            arguments += ["--folder", str(folder)]
            logs, fork = folder / "logs" / part, entry if can_fork() else None
            code = launch_local(arguments, one.world_size, logs, fork)
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

    checked = load(config, list(overrides or ()), _one_layout(layout))
    with distributed_process(device, checked.parallel.collective_timeout_s) as place:
        saved = folder / "checkpoints"
        if part == "straight":
            straight_run(checked, place, steps, folder / "straight.json")
        elif part == "killed":
            killed_run(checked, place, at_step, saved)
        else:
            resumed_run(checked, place, steps, saved, folder / "resumed.json")


def _entry(device: str, layouts: Sequence[Layout]) -> Entry | None:
    """What ranks are forked into, with all imported that some layout needs."""
    only_torch = all(one.engine == "torch" for one in layouts)
    return entry_of_ranks(device, "torch" if only_torch else "deepspeed")


def _choose(config: Path, overrides: list[str], text: str, nproc: int) -> list[Layout]:
    """The layouts to verify, each checked; the single process must be legal too."""
    load(config, overrides, SINGLE)
    if text in ("auto", "pairwise"):
        legal = legal_layouts(nproc, lambda one: load(config, overrides, one))
        return list(legal) if text == "auto" else pairwise(legal)
    chosen = parse_layouts(text)
    for one in chosen:
        load(config, overrides, one)
    return chosen


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
