"""What may be combined, as data: one table that the config check, `auto` and the docs read.

Each row says for which requests an engine is not used, with the measured reason. The figures are
largest loss differences against the single process (docs/design.md, "Engines").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megascale.config.checks import Check
from megascale.config.problems import ConfigError, Problem
from megascale.config.rules import either, neighbours
from megascale.config.schema import Config, read_path
from megascale.engine.pipeline_checks import CHECKS as PIPELINE_CHECKS
from megascale.parallel.pipeline import SCHEDULES

EngineName = Literal["deepspeed", "torch"]


@dataclass(frozen=True)
class Refusal:
    """One row: `engine` does not take configs for which `applies`, because of `reason`.

    Attributes:
        engine: the engine that refuses.
        path: the config name that decides.
        applies: predicate over the config.
        reason: what is wrong there, measured or by construction.
        device: the kind of device on which it holds; None: on every one.
    """

    engine: EngineName
    path: str
    applies: Callable[[Config], bool]
    reason: str
    device: str | None = None


def _is_pipelined(config: Config) -> bool:
    return config.parallel.pipeline_parallel_size > 1


_PER_TENSOR = ("adafactor", "lamb", "muon")
_WHOLE_MATRIX = ("adafactor", "muon")

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
    Refusal(
        "deepspeed",
        "precision.dtype",
        lambda config: config.precision.dtype == "fp16",
        "DeepSpeed refuses fp16 on the CPU (its accelerator's is_fp16_supported() is None there); "
        "the torch engine trains in fp16 on both",
        device="cpu",
    ),
    Refusal(
        "deepspeed",
        "precision.dtype",
        lambda config: config.precision.dtype == "fp64",
        "DeepSpeed's partitions of weights and gradients are fp32 at most",
    ),
    Refusal(
        "deepspeed",
        "optimizer.name",
        lambda config: config.optimizer.name in _PER_TENSOR,
        "LAMB, Adafactor and Muon look at whole tensors, DeepSpeed shows them flat shards of many "
        "(trust ratios of those: loss 11 % to 63 % off in stage 1, NaN in stage 3, silently)",
    ),
    Refusal(
        "deepspeed",
        "parallel.offload_parameters",
        lambda config: config.parallel.offload_parameters and config.parallel.zero_stage < 3,
        "only ZeRO stage 3 divides the parameters, so only it can keep them in host memory",
    ),
    Refusal(
        "deepspeed",
        "parallel.zero_stage",
        lambda config: _is_pipelined(config) and config.parallel.zero_stage > 1,
        "DeepSpeed's stages 2 and 3 fail under a pipeline (0.19.8: stage 2 ends at the second "
        'micro-batch with "Gradient computed twice", stage 3 waits for ever as it gathers); with '
        "a pipeline it does stage 1",
    ),
    Refusal(
        "deepspeed",
        "optimizer.layer_lr_decay",
        lambda config: _is_pipelined(config) and config.optimizer.layer_lr_decay != 1.0,
        "DeepSpeed sums the gradient norm once a parameter group and would wait for ever where "
        "pipeline stages have different groups, as with a learning rate for each layer",
    ),
    Refusal(
        "torch",
        "parallel.pipeline_schedule",
        lambda config: (
            _is_pipelined(config)
            and config.parallel.zero_stage > 1
            and SCHEDULES[config.parallel.pipeline_schedule].splits_backward
        ),
        "zero-bubble schedules compute the gradients of weights outside of the hooks from which "
        "FSDP2 reduces at ZeRO stages 2 and 3; use parallel.zero_stage=1, or "
        "parallel.pipeline_schedule=1f1b or interleaved",
    ),
    Refusal(
        "torch",
        "optimizer.name",
        lambda config: (
            config.optimizer.name in _WHOLE_MATRIX
            and (config.parallel.zero_stage > 0 or config.parallel.tensor_parallel_size > 1)
        ),
        "Adafactor's factors and Muon's orthogonalisation are those of a whole matrix, a shard "
        "holds some of its rows (updates 2 % and 20 % off on 2 ranks); use parallel.zero_stage=0 "
        "and parallel.tensor_parallel_size=1",
    ),
    Refusal(
        "torch",
        "parallel.offload_optimizer",
        lambda config: config.parallel.offload_optimizer,
        "offloading to host memory is DeepSpeed's (ZeRO stages 1 to 3)",
    ),
    Refusal(
        "torch",
        "parallel.offload_parameters",
        lambda config: config.parallel.offload_parameters,
        "offloading to host memory is DeepSpeed's (ZeRO stage 3)",
    ),
)


def refusals(config: Config, engine: EngineName, device_type: str | None = None) -> list[Refusal]:
    """The rows that forbid `engine` for this config.

    Args:
        device_type: "cpu" or "cuda"; None: that of run.device, or not known yet when it is auto
            (then the rows of one kind of device do not count).
    """
    device = device_type or config.run.device
    return [
        row
        for row in REFUSALS
        if row.engine == engine and row.device in (None, device) and row.applies(config)
    ]


def choose_engine(config: Config, device_type: str | None = None) -> EngineName:
    """The engine that runs this (already checked) config."""
    if config.parallel.engine != "auto":
        return config.parallel.engine
    return next(engine for engine in ENGINES if not refusals(config, engine, device_type))


def require_allowed(config: Config, device_type: str) -> None:
    """Check once more, when the device is known.

    Raises:
        ConfigError: the engine that is asked for, or every engine, is refused on this device.
    """
    problems = list(_problems(config, device_type))
    if problems:
        raise ConfigError(problems)


def _problems(config: Config, device_type: str | None) -> Iterator[Problem]:
    asked = config.parallel.engine
    allowed = [engine for engine in ENGINES if not refusals(config, engine, device_type)]
    if asked == "auto":
        if not allowed:
            rows = [row for engine in ENGINES for row in refusals(config, engine, device_type)]
            rule = "no engine does this: " + "; ".join(f"{r.engine}: {r.reason}" for r in rows)
            paths = " or ".join(dict.fromkeys(row.path for row in rows))
            yield Problem(rows[-1].path, read_path(config, rows[-1].path), rule, f"change {paths}")
        return
    for row in refusals(config, asked, device_type):
        yield Problem(
            path="parallel.engine",
            value=asked,
            rule=f"with {row.path} as given: {row.reason}",
            hint=f"parallel.engine={allowed[0]} or auto" if allowed else "change " + row.path,
        )


def _engine_allowed(config: Config, world_size: int | None) -> Iterator[Problem]:
    """An engine that is asked for by name must be right for the rest of the config."""
    del world_size
    yield from _problems(config, None)


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
    if config.parallel.sequence_parallel and config.parallel.context_parallel_size == 1:
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


def _context_parallel_fits(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Two equal chunks of the sequence on each rank, and for ulysses whole heads."""
    del world_size
    model, parallel = config.model, config.parallel
    size, tensor = parallel.context_parallel_size, parallel.tensor_parallel_size
    if size == 1:
        return
    if model.seq_length % parallel.sequence_multiple:
        multiple = parallel.sequence_multiple
        equation = f"2 * parallel.context_parallel_size = 2 * {size} chunks, two a rank"
        if parallel.sequence_parallel:
            equation += f", which its {tensor} tensor-parallel ranks share once more"
        near = either(neighbours(model.seq_length, multiple))
        yield Problem(
            path="model.seq_length",
            value=model.seq_length,
            rule=f"must be a multiple of {multiple}: it is cut into {equation}",
            hint=f"model.seq_length = {near}, or fewer context-parallel ranks",
        )
    heads = model.num_attention_heads
    if parallel.context_parallel_method == "ulysses" and heads % (tensor * size):
        legal = [n for n in range(1, size + 1) if heads % (tensor * n) == 0]
        fewer = f"parallel.context_parallel_size = {legal[-1]}, or " if legal else ""
        yield Problem(
            path="parallel.context_parallel_method",
            value="ulysses",
            rule="every rank attends with whole heads: model.num_attention_heads / "
            "(parallel.tensor_parallel_size * parallel.context_parallel_size) = "
            f"{heads} / ({tensor} * {size}) = {heads / (tensor * size):.4g} must be an integer",
            hint=f"{fewer}parallel.context_parallel_method = ring, which takes any number of heads",
        )


CHECKS: tuple[Check, ...] = (
    Check(
        reads=(
            "parallel.context_parallel_size",
            "parallel.context_parallel_method",
            "parallel.tensor_parallel_size",
            "parallel.sequence_parallel",
            "model.num_attention_heads",
            "model.seq_length",
        ),
        run=_context_parallel_fits,
    ),
    Check(
        reads=(
            "parallel.tensor_parallel_size",
            "parallel.sequence_parallel",
            "parallel.context_parallel_size",
            "model.num_attention_heads",
            "model.num_kv_heads",
            "model.seq_length",
            "model.ffn_hidden_size",
        ),
        run=_tensor_parallel_fits,
    ),
    Check(
        reads=(
            "run.device",
            "optimizer.name",
            "precision.dtype",
            "parallel.engine",
            "parallel.zero_stage",
            "parallel.tensor_parallel_size",
            "parallel.pipeline_parallel_size",
            "parallel.pipeline_schedule",
            "parallel.offload_optimizer",
            "parallel.offload_parameters",
            "optimizer.layer_lr_decay",
        ),
        run=_engine_allowed,
    ),
    *PIPELINE_CHECKS,
)
