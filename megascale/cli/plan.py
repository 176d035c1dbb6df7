"""`megascale plan`: what a layout costs, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.planner.simulation import Simulation

app = typer.Typer(help="What a layout costs, before it runs.", no_args_is_help=True)


@app.callback()
def plan() -> None:
    """What a layout costs, before it runs."""


@app.command()
def simulate(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Number of ranks.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to draw the timeline: .png, .svg, .pdf or .html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON.")] = False,
) -> None:
    """Play one step's pipeline schedule in time: who computes what when, and who waits."""
    from megascale.planner.timeline_plot import require_format, save_timeline

    if output is not None:
        require_format(output)
    partly = load_config(config, overrides or (), checks=())
    ranks = world_size or partly.parallel.model_parallel_size
    checked = load_config(config, overrides or (), checks=all_checks(), world_size=ranks)
    _require_pipeline(checked)
    simulation = _simulate(checked, ranks)
    if output is not None:
        save_timeline(simulation.timeline, simulation.title, output)
    if as_json:
        typer.echo(json.dumps(simulation.as_json(), indent=1))
        return
    _show(simulation, Console(), output)


def _require_pipeline(config: Config) -> None:
    if config.parallel.pipeline_parallel_size == 1:
        raise UserError(
            "parallel.pipeline_parallel_size=1",
            rule="a schedule is the order in which several pipeline ranks compute",
            remedy="for example parallel.pipeline_parallel_size=2",
        )


def _simulate(config: Config, ranks: int) -> Simulation:
    from megascale.planner.simulation import play_layout
    from megascale.training.assemble import pipeline_layout
    from megascale.training.datasets import open_corpora, resolve_vocab_size
    from megascale.training.tasks.registry import build_task

    if config.model.vocab_size is None:
        config = resolve_vocab_size(config, open_corpora(config))
    task = build_task(config)
    layout = pipeline_layout(config, task)
    assert layout is not None
    at_once = config.train.micro_batch_size * ranks // config.parallel.model_parallel_size
    return play_layout(layout, task.stage_costs(), config.train.global_batch_size // at_once)


def _show(simulation: Simulation, console: Console, output: Path | None) -> None:
    timeline = simulation.timeline
    table = Table(title=simulation.title)
    for column in ("rank", "layers of its stages", "idle", "activations kept"):
        table.add_column(column)
    for rank in range(timeline.size):
        layers = ", ".join(f"{chunk.begin}-{chunk.end - 1}" for chunk in simulation.chunks(rank))
        idle = f"{timeline.idle(rank) / timeline.duration:.1%}"
        kept = f"{timeline.activations(rank)} forwards of a stage"
        table.add_row(str(rank), layers, idle, kept)
    console.print(table)
    console.print(
        f"waiting / computing = {timeline.bubble:.3f}; "
        f"1F1B on equal stages would have (p - 1) / m = {simulation.plain_bubble:.3f}"
    )
    if output is not None:
        console.print(f"drawn to {output}", soft_wrap=True)
