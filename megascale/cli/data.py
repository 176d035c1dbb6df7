"""`megascale data which RUN`: what the steps of a run read."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

app = typer.Typer(help="Look into datasets and into what runs read.", no_args_is_help=True)

_SHOWN = 100  # characters of a sample's text in the plain form


@app.callback()
def data() -> None:
    """A group also while it has a single command."""


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
