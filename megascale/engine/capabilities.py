"""What may be combined, as data: one table that the config check, `auto` and the docs read.

Each row says for which requests an engine is not used, with the measured reason. The figures are
largest loss differences against the single process (docs/design.md, "Engines").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megascale.config.checks import Check
from megascale.config.problems import Problem
from megascale.config.schema import Config

EngineName = Literal["deepspeed", "torch"]


@dataclass(frozen=True)
class Refusal:
    """One row: `engine` does not take configs for which `applies`, because of `reason`.

    Attributes:
        engine: the engine that refuses.
        path: the config name that decides.
        applies: predicate over the config.
        reason: what is wrong there, measured or by construction.
    """

    engine: EngineName
    path: str
    applies: Callable[[Config], bool]
    reason: str


# In order of preference: `auto` takes the first engine without a refusal.
ENGINES: tuple[EngineName, ...] = ("deepspeed", "torch")

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "deepspeed",
        "parallel.zero_stage",
        lambda config: config.parallel.zero_stage == 0,
        "DeepSpeed's stage 0 is silently wrong in half precision (loss off by 7e-2 in bf16, 0.48 "
        "in fp16) and reports no gradient norm in fp32; stage 0 runs on the torch engine",
    ),
)


def refusals(config: Config, engine: EngineName) -> list[Refusal]:
    """The rows that forbid `engine` for this config."""
    return [row for row in REFUSALS if row.engine == engine and row.applies(config)]


def choose_engine(config: Config) -> EngineName:
    """The engine that runs this (already checked) config."""
    if config.parallel.engine != "auto":
        return config.parallel.engine
    return next(engine for engine in ENGINES if not refusals(config, engine))


def _engine_allowed(config: Config, world_size: int | None) -> Iterator[Problem]:
    """An engine that is asked for by name must be right for the rest of the config."""
    del world_size
    if config.parallel.engine == "auto":
        return
    for row in refusals(config, config.parallel.engine):
        others = [engine for engine in ENGINES if not refusals(config, engine)]
        yield Problem(
            path="parallel.engine",
            value=config.parallel.engine,
            rule=f"with {row.path} as given: {row.reason}",
            hint=f"parallel.engine={others[0]} or auto" if others else "change " + row.path,
        )


def _tensor_parallel_fits(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Whole heads on each rank; with sequence parallelism, equal parts of the sequence."""
    del world_size
    model, size = config.model, config.parallel.tensor_parallel_size
    if size == 1:
        return
    divided = [
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_kv_heads", model.resolved_num_kv_heads),
    ]
    if config.parallel.sequence_parallel:
        divided.append(("model.seq_length", model.seq_length))
    for path, value in divided:
        if value % size:
            near = [n for n in range(1, value + 1) if value % n == 0 and n <= size]
            yield Problem(
                path=path,
                value=value,
                rule=f"must be a multiple of parallel.tensor_parallel_size = {size}: each rank "
                "takes an equal, whole share",
                hint=f"parallel.tensor_parallel_size = {near[-1]}, or {path} = "
                f"{-(-value // size) * size}",
            )
    if model.resolved_ffn_hidden_size < size:
        yield Problem(
            path="model.ffn_hidden_size",
            value=model.resolved_ffn_hidden_size,
            rule=f"must be at least parallel.tensor_parallel_size = {size}",
            hint="use fewer tensor-parallel ranks",
        )


CHECKS: tuple[Check, ...] = (
    Check(
        reads=(
            "parallel.tensor_parallel_size",
            "parallel.sequence_parallel",
            "model.num_attention_heads",
            "model.num_kv_heads",
            "model.seq_length",
            "model.ffn_hidden_size",
        ),
        run=_tensor_parallel_fits,
    ),
    Check(
        reads=("parallel.engine", "parallel.zero_stage", "precision.dtype", "optimizer.name"),
        run=_engine_allowed,
    ),
)
