"""`megascale verify layout`: prove on real processes that layouts are the same training."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.cli.process import distributed_process
from megascale.config.load import load_config
from megascale.config.schema import Config
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
                record_run(checked, place, steps, folder / str(chosen) / variant)
            (folder / str(chosen) / "done").touch()


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


def _failure(log_dir: Path, size: int) -> str:
    """What the rank that failed first noted; "" for one that died without a word."""
    notes = read_notes(log_dir, size)
    first = min(notes.values(), key=lambda note: (note.lost_peer, note.time_s), default=None)
    return "" if first is None else f"rank {first.rank}: {first.text}"


def _compare(config: Path, overrides: list[str], chosen: Layout, folder: Path) -> Row:
    from megascale.verification.compare import BF16, FP32, compare
    from megascale.verification.record import read_record
    from megascale.verification.report import Row

    verdicts, costs = {}, {}
    for variant in VARIANTS:
        changes = _changes(config, overrides, variant)
        checked = _load(config, [*overrides, *changes], chosen)
        tolerance = FP32 if checked.precision.dtype == "fp32" else BF16
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
