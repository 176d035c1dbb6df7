"""`megascale evaluate CKPT`: loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from megascale.checkpoint.manifest import read_manifest
from megascale.checkpoint.storage import Storage
from megascale.cli.process import distributed_process, launch_ranks
from megascale.cli.train import Nproc

CheckpointFolder = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint folder, .../checkpoints/step_XXXXXXXX.")
]
Weights = Annotated[
    str, typer.Option(help="trained, ema (train.ema_decay), or last-K: mean of K checkpoints.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def evaluate(
    checkpoint: CheckpointFolder,
    split: Annotated[
        str, typer.Option(help="train, valid, test, or a set of data.validation.")
    ] = "valid",
    data: Annotated[
        str | None, typer.Option(help="Another prepared dataset; all of it is evaluated.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also print the unigram and bigram entropy of the training data.")
    ] = False,
    weights: Weights = "trained",
    nproc: Nproc = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a checkpoint on a held-out split."""
    # refused here, before ranks start and the folder of their logs is made
    read_manifest(Storage(checkpoint))
    with tempfile.TemporaryDirectory(prefix="megascale-evaluate-") as logs:
        if launch_ranks(nproc, Path(logs), device):
            return
    with distributed_process(device) as place:
        from megascale.training.held_out import evaluate_checkpoint

        report = evaluate_checkpoint(
            checkpoint,
            place,
            split=split,
            data=data,
            max_samples=max_samples,
            baselines=baselines,
            weights=weights,
        )
        if report is not None:
            typer.echo(json.dumps(report) if as_json else _table(report))


def _table(report: dict[str, object]) -> str:
    width = max(len(name) for name in report)
    rows = []
    for name, value in report.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        rows.append(f"{name:<{width}}  {shown}")
    return "\n".join(rows)
