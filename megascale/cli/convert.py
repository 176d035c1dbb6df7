"""`megascale convert to-hf | from-hf`: checkpoints to and from Hugging Face."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.cli.evaluate import CheckpointFolder, Weights

if TYPE_CHECKING:
    import torch

    from megascale.config.schema import Config

app = typer.Typer(help="Convert checkpoints to and from Hugging Face.", no_args_is_help=True)


class WeightType(str, Enum):
    """Types in which weights can be stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class SentenceObjective(str, Enum):
    """Values of data.sentence_objective."""

    NONE = "none"
    NSP = "nsp"
    SOP = "sop"


@app.command("to-hf")
def to_hf(
    checkpoint: CheckpointFolder,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
    dtype: Annotated[WeightType, typer.Option(help="Type of the weights.")] = WeightType.FP32,
    shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 5GB or 500MB.")] = "5GB",
    family: Annotated[
        str | None, typer.Option(help="model_type to write; the first that fits by default.")
    ] = None,
    weights: Weights = "trained",
) -> None:
    """Write a checkpoint as a folder that transformers loads."""
    from megascale.checkpoint.reader import CheckpointReader
    from megascale.hf.exporting import export_model, parse_size
    from megascale.training.inference import checkpoint_tokenizer

    reader = CheckpointReader(checkpoint)
    try:
        done = export_model(
            reader,
            checkpoint_tokenizer(reader),
            out,
            family_name=family,
            dtype=_dtype(dtype),
            shard_bytes=parse_size(shard_size),
            weights=weights,
        )
    finally:
        reader.close()
    typer.echo(
        f"{out}: {done.family}, {done.num_parameters:,} parameters in {done.num_files} file(s)"
    )


@app.command("from-hf")
def from_hf(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of transformers, or a .gguf file.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
    dtype: Annotated[
        WeightType | None, typer.Option(help="Type of the weights; as found by default.")
    ] = None,
    sentence_objective: Annotated[
        SentenceObjective | None,
        typer.Option(help="Of a BERT; nsp if the files have a head for it, else none."),
    ] = None,
) -> None:
    """Write a model of transformers as a checkpoint of step 0, to evaluate or to train on from."""
    from megascale.hf.importing import import_model

    done = import_model(
        source,
        out,
        _shapes,
        None if dtype is None else _dtype(dtype),
        None if sentence_objective is None else sentence_objective.value,
    )
    typer.echo(f"{done.checkpoint}: {done.family}, {done.num_parameters:,} parameters")
    if done.drawn:
        typer.echo(f"not in {source}, initialised as in a new model: {', '.join(done.drawn)}")
    if done.left_out:
        typer.echo(f"left out, of a head that this model lacks: {', '.join(done.left_out)}")
    typer.echo(f"train on from it: megascale train {done.config_file} data.path=...")


def _dtype(name: WeightType) -> torch.dtype:
    from megascale.engine.factory import DTYPES

    return DTYPES[name.value]


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the model that a config describes."""
    import torch

    from megascale.training.tasks.registry import build_task

    with torch.device("meta"):
        module = build_task(config).build_module()
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
