"""`megascale config show | check | schema`: look at a configuration without running it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer

from megascale.config.checks import DEFAULT_CHECKS, Check
from megascale.config.load import dump_config, load_config
from megascale.config.problems import show_value
from megascale.config.schema import Config, config_schema, read_path
from megascale.data.batch_size import batch_size_schedule

app = typer.Typer(help="Show, check and describe configurations.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.NAME=VALUE]...", help="Settings that replace the file's."),
]
WorldSize = Annotated[
    int | None, typer.Option(min=1, help="Number of ranks; the batch sizes must fit it.")
]


def all_checks() -> tuple[Check, ...]:
    """The rules of the config itself and the engines' table of what may be combined."""
    from megascale.engine.capabilities import CHECKS

    return (*DEFAULT_CHECKS, *CHECKS)


@app.command()
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every setting with its value, as a config file."""
    loaded = load_config(config, overrides or (), checks=all_checks())
    typer.echo(dump_config(loaded), nl=False)
    for path, value in loaded.derived.items():
        if value is not None and read_path(loaded, path) is None:
            typer.echo(f"# {path}: null means {show_value(value)} here")


@app.command()
def check(config: ConfigFile, overrides: Overrides = None, world_size: WorldSize = None) -> None:
    """Print ok and a summary, or everything that is wrong (exit code 2)."""
    loaded = load_config(config, overrides or (), checks=all_checks(), world_size=world_size)
    typer.echo("ok")
    for line in _summary(loaded, world_size):
        typer.echo(f"  {line}")


@app.command()
def schema() -> None:
    """Print the JSON schema of config files, for editors."""
    typer.echo(json.dumps(config_schema(), indent=2))


@app.command()
def layout(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on one machine; null: all on one.")
    ] = None,
) -> None:
    """Print who is where: each rank's place along the axes pp, dp, cp and tp."""
    loaded = load_config(config, overrides or (), checks=all_checks(), world_size=world_size)
    parallel, per_node = loaded.parallel, ranks_per_node or world_size
    sizes = {
        "pp": parallel.pipeline_parallel_size,
        "dp": world_size // parallel.model_parallel_size,
        "cp": parallel.context_parallel_size,
        "tp": parallel.tensor_parallel_size,
    }
    typer.echo("world size " + " x ".join(f"{axis} {n}" for axis, n in sizes.items()))
    typer.echo("rank  node  " + "  ".join(sizes))
    for rank, place in enumerate(itertools.product(*map(range, sizes.values()))):
        row = "  ".join(f"{index:>2}" for index in place)
        typer.echo(f"{rank:>4}  {rank // per_node:>4}  {row}")
    if per_node % sizes["tp"]:
        typer.echo(
            f"warning: tensor-parallel groups of {sizes['tp']} cross machines of {per_node} ranks; "
            "their collectives lie on the critical path of every layer"
        )


@app.command()
def matrix() -> None:
    """Print what may be combined with what, and why not: the table of docs/layouts.md."""
    from megascale.engine.matrix import capability_matrix

    typer.echo(capability_matrix(all_checks()), nl=False)


def _summary(config: Config, world_size: int | None) -> list[str]:
    model, train, parallel = config.model, config.train, config.parallel
    tokens = train.global_batch_size * model.seq_length
    total = batch_size_schedule(train).samples_after(train.max_steps) * model.seq_length
    batch = f"{train.global_batch_size} samples ({tokens:,} tokens)"
    if world_size is not None:
        ranks = world_size // parallel.model_parallel_size
        passes = train.global_batch_size // (train.micro_batch_size * ranks)
        batch += f" = {train.micro_batch_size} * {ranks} ranks * {passes} accumulation steps"
    return [
        f"model    {model.family}, {model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads, {model.seq_length} tokens",
        f"data     {', '.join(config.data.source_paths)}",
        f"batch    {batch}",
        f"run      {train.max_steps:,} steps, {total:,} tokens, into {config.run.output_dir}",
        f"engine   {parallel.engine}, ZeRO stage {parallel.zero_stage}, {config.precision.dtype}",
    ]
