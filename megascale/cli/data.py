"""`megascale data ...`: what the steps of a run read, and the commands of `python -m data_prep`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

_SHOWN = 100  # characters of a sample's text in the plain form


class WithDataPrep(typer.core.TyperGroup):
    """A group that has the commands of data_prep beside its own.

    They are imported when they are asked for: every other command starts without them.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, its own first."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in self._data_prep() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Its own command of that name, else data_prep's."""
        return super().get_command(ctx, cmd_name) or self._data_prep().get(cmd_name)

    def _data_prep(self) -> dict[str, Any]:
        from data_prep.app import app as data_prep_app

        group = typer.main.get_command(data_prep_app)
        assert isinstance(group, typer.core.TyperGroup)
        return dict(group.commands)


app = typer.Typer(
    cls=WithDataPrep,
    help="Prepare datasets, look into them and into what runs read.",
    no_args_is_help=True,
)


@app.callback()
def data() -> None:
    """A group, also with one command of its own."""


@app.command()
def which(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, a checkpoint's, or a config file.")
    ],
    step: Annotated[int, typer.Option(min=1, help="Past or future, counted as in metrics.jsonl.")],
    rank: Annotated[
        int | None, typer.Option(min=0, help="Only what this rank reads; else all of the step.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks, for --rank; else that of the last checkpoint."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print source, shard, documents and text of every sample of a step."""
    from megascale.training.which import RunSamples

    samples = RunSamples(run).of_step(step, rank, world_size)
    if as_json:
        found = {"step": step, "rank": rank, "samples": [asdict(sample) for sample in samples]}
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    typer.echo(
        f"step {step} reads {len(samples)} samples" + ("" if rank is None else f" on rank {rank}")
    )
    for sample in samples:
        typer.echo(
            f"sample {sample.sample}: {sample.source} sample {sample.source_sample} "
            f"(epoch {sample.epoch}, stage {sample.stage}), {sample.tokens} tokens"
        )
        for part in sample.documents:
            tokens = f"tokens {part.start}..{part.stop - 1}"
            typer.echo(f"    {part.shard} document {part.document} {tokens}")
        if sample.text is not None:
            short = sample.text if len(sample.text) <= _SHOWN else sample.text[:_SHOWN] + "..."
            typer.echo(f"    {json.dumps(short, ensure_ascii=False)}")
