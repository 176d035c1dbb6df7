"""`megascale convert`: checkpoints to and from Hugging Face, and from DeepSpeed and Megatron-LM."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.cli.evaluate import CheckpointFolder, Weights

if TYPE_CHECKING:
    import torch

    from megascale.config.schema import Config
    from megascale.importers.importing import Report

app = typer.Typer(
    help="Convert checkpoints to and from Hugging Face, and from DeepSpeed and Megatron-LM.",
    no_args_is_help=True,
)


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


Output = Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")]


@app.command("to-hf")
def to_hf(
    checkpoint: CheckpointFolder,
    out: Output,
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
    out: Output,
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


Stored = Annotated[
    WeightType | None, typer.Option("--dtype", help="Type of the weights; as found by default.")
]


@app.command("from-deepspeed")
def from_deepspeed(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="What engine.save_checkpoint was given.")
    ],
    out: Output,
    model: Annotated[
        str | None,
        typer.Option(
            help="What the module is: a folder or config.json of transformers, or a megascale "
            "config (.yaml); config.json in or above DIR by default."
        ),
    ] = None,
    dtype: Stored = None,
) -> None:
    """Write a DeepSpeed checkpoint (ZeRO 0 to 3) as one of ours: weights, and Adam's moments."""
    from megascale.importers.importing import import_deepspeed

    kept = None if dtype is None else _dtype(dtype)
    _tell(import_deepspeed(source, out, model, _shapes, kept))


@app.command("from-megatron")
def from_megatron(
    source: Annotated[str, typer.Argument(metavar="DIR", help="What --save named.")],
    out: Output,
    dtype: Stored = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of the embedding to keep; all, with padding, by default."),
    ] = None,
) -> None:
    """Write the weights of a Megatron-LM GPT (--ckpt-format torch, any layout) as ours."""
    from megascale.importers.importing import import_megatron

    kept = None if dtype is None else _dtype(dtype)
    _tell(import_megatron(source, out, _shapes, kept, vocab_size))


def _tell(report: Report) -> None:
    kinds = ", ".join(report.kinds)
    typer.echo(
        f"{report.checkpoint}: {report.program}, {report.num_parameters:,} parameters, {kinds}"
    )
    for line in (
        *(f"lost: {what}" for what in report.lost),
        *(f"not in {report.source}, initialised as in a new model: {n}" for n in report.drawn),
        *(f"left out, of a head that this model lacks: {name}" for name in report.left_out),
    ):
        typer.echo(line)
    typer.echo(f"train on from it: megascale train {report.config_file} data.path=...")


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
