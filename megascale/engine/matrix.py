"""What may be combined, as a table for people: every cell is asked of the config's own checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megascale.config.load import load_config
from megascale.config.problems import ConfigError
from megascale.config.rules import Check
from megascale.parallel.pipeline import SCHEDULES

_BASE = (
    "data.path=d",
    "model.num_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.seq_length=64",
    "train.global_batch_size=32",
    "train.micro_batch_size=1",
)
_WORLD = 8
_COLUMNS = [("torch", stage) for stage in range(4)] + [("deepspeed", stage) for stage in (1, 2, 3)]


@dataclass(frozen=True)
class Row:
    """A feature and the settings that ask for it."""

    name: str
    overrides: tuple[str, ...]


def _rows() -> Iterator[Row]:
    tensor = "parallel.tensor_parallel_size=2"
    sequence = (tensor, "parallel.sequence_parallel=true")
    bert = "model.family=bert"
    yield Row("data parallel", ())
    yield Row("tensor parallel", (tensor,))
    yield Row("tensor + sequence parallel", sequence)
    for method in ("ulysses", "ring"):
        context = (
            "parallel.context_parallel_size=2",
            f"parallel.context_parallel_method={method}",
        )
        yield Row(f"context parallel {method}", context)
        yield Row(f"context parallel {method} + tensor + sequence parallel", (*context, *sequence))
    for name, kind in SCHEDULES.items():
        stages = kind.stages_per_rank[0]
        pipeline = (
            "parallel.pipeline_parallel_size=2",
            f"parallel.pipeline_schedule={name}",
            f"parallel.virtual_pipeline_stages={stages}",
        )
        yield Row(f"pipeline {name}", pipeline)
        if name == "1f1b":
            yield Row(f"pipeline {name} + tensor + sequence parallel", (*pipeline, *sequence))
            both = (*pipeline, "parallel.context_parallel_size=2")
            yield Row(f"pipeline {name} + context parallel", both)
    for mode in ("selective", "full"):
        yield Row(f"recomputation {mode}", (f"parallel.activation_recomputation={mode}",))
    yield Row("recomputation by a memory budget", ("parallel.activation_memory_mb=100",))
    yield Row("bf16", ("precision.dtype=bf16",))
    yield Row("fp64", ("precision.dtype=fp64",))
    yield Row("fp16 on CPU", ("precision.dtype=fp16", "run.device=cpu"))
    yield Row("fp16 on GPU", ("precision.dtype=fp16", "run.device=cuda"))
    for name in ("sgd", "lion", "lamb", "adafactor", "muon"):
        yield Row(f"optimizer {name}", (f"optimizer.name={name}",))
    yield Row("optimizer offload", ("parallel.offload_optimizer=true",))
    yield Row("parameter offload", ("parallel.offload_parameters=true",))
    yield Row("BERT, tensor parallel", (bert, "model.activation=gelu", tensor))
    yield Row("BERT, tensor + sequence parallel", (bert, "model.activation=gelu", *sequence))
    for axis in ("context", "pipeline"):
        asked = (bert, "model.activation=gelu", f"parallel.{axis}_parallel_size=2")
        yield Row(f"BERT, {axis} parallel", asked)


def capability_matrix(checks: Sequence[Check]) -> str:
    """A Markdown table: features by engine and ZeRO stage, with the reason of every "no"."""
    reasons: dict[str, int] = {}
    heads = [f"{engine} {stage}" for engine, stage in _COLUMNS]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in _rows():
        cells = []
        for engine, stage in _COLUMNS:
            asked = (f"parallel.engine={engine}", f"parallel.zero_stage={stage}")
            reason = _refusal((*_BASE, *row.overrides, *asked), checks)
            number = reasons.setdefault(reason, len(reasons) + 1) if reason else 0
            cells.append(f"no [{number}]" if reason else "yes")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes, ""])


def _refusal(overrides: Sequence[str], checks: Sequence[Check]) -> str:
    """Why these settings are refused; "" when they are taken."""
    try:
        load_config({}, overrides, checks=checks, world_size=_WORLD)
    except ConfigError as error:
        return "; ".join(problem.rule for problem in error.problems)
    return ""
