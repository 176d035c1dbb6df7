"""Rules that join several settings, as a table of small functions.

A check tells which settings it reads; it is left out when one of them is invalid. Nothing here
changes a config. Three kinds: arithmetic that must come out even, settings that would be ignored
beside others, and settings whose part of the program is not built yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megascale.config import recipe_checks
from megascale.config.problems import Problem, show_value
from megascale.config.schema import Config, leaf_fields, read_path

CheckFunction = Callable[[Config, "int | None"], Iterable[Problem]]


@dataclass(frozen=True)
class Check:
    """One rule.

    Args:
        reads: dotted paths of the settings that it looks at.
        run: function of (config, world size or None) that yields what is wrong.
    """

    reads: tuple[str, ...]
    run: CheckFunction

    @property
    def name(self) -> str:
        return getattr(self.run, "__name__", None) or str(self.run)


def neighbours(number: int, divisor: int) -> list[int]:
    """The positive multiples of `divisor` next to `number`."""
    below = number // divisor * divisor
    nearest = [below, below + divisor] if below != number else [number]
    return [n for n in nearest if n > 0]


def divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` that is <= `wanted` and the smallest that is >= it."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    every = {*small, *(number // n for n in small)}
    below, above = {n for n in every if n <= wanted}, {n for n in every if n >= wanted}
    return sorted({*sorted(below)[-1:], *sorted(above)[:1]})


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)


# Arithmetic -----------------------------------------------------------------------------------


def heads_divide_hidden_size(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every head has the same width."""
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if hidden % heads:
        rule = f"must be a multiple of model.num_attention_heads = {heads}"
        hint = (
            f"model.hidden_size = {_either(neighbours(hidden, heads))}, "
            f"or model.num_attention_heads = {_either(divisors_near(hidden, heads))}"
        )
        yield Problem("model.hidden_size", hidden, rule, hint)


def kv_heads_divide_heads(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every key-value head serves the same number of query heads."""
    heads, kv_heads = config.model.num_attention_heads, config.model.resolved_num_kv_heads
    if heads % kv_heads:
        rule = f"must divide model.num_attention_heads = {heads}"
        hint = f"model.num_kv_heads = {_either(divisors_near(heads, kv_heads))}"
        yield Problem("model.num_kv_heads", kv_heads, rule, hint)


def rope_needs_even_head_width(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Rotary positions turn pairs of features (arXiv:2104.09864)."""
    model = config.model
    uneven = model.hidden_size % model.num_attention_heads == 0 and model.head_width % 2
    if model.position_embedding == "rope" and uneven:
        rule = (
            "rope rotates pairs of features, so the head width must be even; hidden_size / "
            f"num_attention_heads = {model.hidden_size} / {model.num_attention_heads} = "
            f"{model.head_width}"
        )
        sizes = _either(neighbours(model.hidden_size, 2 * model.num_attention_heads))
        yield Problem("model.position_embedding", "rope", rule, f"model.hidden_size = {sizes}")


def min_lr_below_lr(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A decay ends below where it starts."""
    if config.schedule.min_lr > config.optimizer.lr:
        rule = f"must be <= optimizer.lr = {config.optimizer.lr}, where the decay starts"
        yield Problem("schedule.min_lr", config.schedule.min_lr, rule, "lower it or raise the lr")


def warmup_inside_run(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The warm-up ends before the run does."""
    warmup, steps = config.schedule.warmup_steps, config.train.max_steps
    if warmup > steps:
        rule = f"must be <= train.max_steps = {steps}, else optimizer.lr is never reached"
        hint = f"schedule.warmup_steps <= {steps}, or train.max_steps >= {warmup}"
        yield Problem("schedule.warmup_steps", warmup, rule, hint)


def decay_after_warmup(config: Config, world_size: int | None) -> Iterator[Problem]:
    """linear and cosine decay between the warm-up's end and decay_steps."""
    warmup, decay = config.schedule.warmup_steps, config.schedule.decay_steps
    if config.schedule.name in ("linear", "cosine") and decay is not None and decay < warmup:
        rule = f"must be >= schedule.warmup_steps = {warmup}: the decay ends at this step"
        hint = "leave it out to decay until train.max_steps"
        yield Problem("schedule.decay_steps", decay, rule, hint)


def wsd_fits_run(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The warm-up and the final decay of wsd do not overlap."""
    warmup, steps = config.schedule.warmup_steps, config.train.max_steps
    decay = config.resolved_decay_steps
    if config.schedule.name == "wsd" and decay is not None and warmup + decay > steps >= warmup:
        rule = (
            "the warm-up and the final decay must fit into the run: "
            f"{warmup} + {decay} > train.max_steps = {steps}"
        )
        hint = f"shorten one of them, or train.max_steps >= {warmup + decay}"
        yield Problem("schedule.decay_steps", decay, rule, hint)


def inverse_sqrt_needs_warmup(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The warm-up's length is the unit in which inverse_sqrt falls."""
    if config.schedule.name == "inverse_sqrt" and config.schedule.warmup_steps == 0:
        rule = "inverse_sqrt falls as sqrt(warmup_steps / step), so it needs a warm-up"
        yield Problem("schedule.warmup_steps", 0, rule, "for example schedule.warmup_steps = 100")


def _data_parallel_size(config: Config, world_size: int | None) -> int | None:
    """world_size / (tensor * pipeline * context parallel size), None where that is not known."""
    group = config.parallel.model_parallel_size
    if world_size is None or world_size < 1 or world_size % group:
        return None
    return world_size // group


def micro_batch_divides_global(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What can be told of the batch without the data-parallel size."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if _data_parallel_size(config, world_size) is None and total % micro:
        rule = f"must be a multiple of train.micro_batch_size = {micro}"
        hint = (
            f"train.global_batch_size = {_either(neighbours(total, micro))}, "
            f"or train.micro_batch_size = {_either(divisors_near(total, micro))}"
        )
        yield Problem("train.global_batch_size", total, rule, hint)


def world_size_fits_layout(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every copy of the model has all its ranks."""
    group = config.parallel.model_parallel_size
    if world_size is None or _data_parallel_size(config, world_size) is not None:
        return
    rule = (
        "data_parallel_size = world_size / (tensor * pipeline * context parallel size) = "
        f"{world_size} / {group} must be a positive integer"
    )
    hint = f"start {_either(neighbours(max(world_size, 1), group))} ranks"
    yield Problem("world_size", world_size, rule, hint)


def batch_fits_world_size(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every rank runs the same number of full micro-batches in a step."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    ranks = _data_parallel_size(config, world_size)
    if ranks is None or total % (micro * ranks) == 0:
        return
    rule = (
        "global_batch_size = micro_batch_size * data_parallel_size * gradient accumulation steps, "
        f"but {total} = {micro} * {ranks} * {total / (micro * ranks):.4g}"
    )
    hints = [f"train.global_batch_size = {_either(neighbours(total, micro * ranks))}"]
    if total % ranks == 0:
        fitting = _either(divisors_near(total // ranks, micro))
        hints.append(f"train.micro_batch_size = {fitting}")
    if total % micro == 0:
        sizes = divisors_near(total // micro, ranks)
        group = config.parallel.model_parallel_size
        hints.append(f"start {_either(size * group for size in sizes)} ranks")
    yield Problem("train.global_batch_size", total, rule, ", or ".join(hints))


# What is asked must be possible, and must not be ignored ---------------------------------------

_ASKS_FOR_VALIDATION = (
    "evaluation.interval",
    "evaluation.max_samples",
    "evaluation.early_stop_patience",
    "evaluation.target_loss",
)


def validation_needs_split(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What uses a validation set finds one."""
    if config.data.has_validation:
        return
    for path in _ASKS_FOR_VALIDATION:
        value = read_path(config, path)
        if value and not (path == "evaluation.interval" and config.evaluation.prompts):
            rule = (
                f"there is nothing to validate on: data.split = {list(config.data.split)} "
                "and no data.validation"
            )
            yield Problem(path, value, rule, "for example data.split = [0.98, 0.02]")


def stopping_needs_interval(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What stops a run early is looked at during the run."""
    if config.evaluation.interval:
        return
    for path in ("evaluation.early_stop_patience", "evaluation.target_loss"):
        value = read_path(config, path)
        if value is not None:
            rule = "a run can stop early only where it validates: evaluation.interval is 0"
            yield Problem(path, value, rule, "for example evaluation.interval = 100")


def _ignored(path: str, beside: str, used: Callable[[object], bool], when: str) -> Check:
    """A setting that differs from its default, beside another one under which it does nothing."""
    default = dict(leaf_fields())[path].default

    def run(config: Config, world_size: int | None) -> Iterator[Problem]:
        value, other = read_path(config, path), read_path(config, beside)
        if value != default and not used(other):
            rule = f"has an effect only when {when}; {beside} is {other}"
            yield Problem(path, value, rule, "leave it out, or change the other setting")

    run.__name__ = f"ignored:{path}"
    return Check((path, beside), run)


def _among(*values: str) -> Callable[[object], bool]:
    return lambda value: value in values


_IGNORED = (
    _ignored(
        "parallel.sequence_parallel",
        "parallel.tensor_parallel_size",
        lambda size: size != 1,
        "several ranks share a layer",
    ),
    _ignored(
        "model.rope_theta", "model.position_embedding", _among("rope"), "positions are rotary"
    ),
    _ignored(
        "optimizer.momentum",
        "optimizer.name",
        _among("sgd", "muon"),
        "the optimizer is sgd or muon",
    ),
    _ignored(
        "optimizer.betas",
        "optimizer.name",
        _among("adamw", "lion", "lamb", "muon"),
        "the optimizer is adamw, lion, lamb or muon",
    ),
    _ignored(
        "optimizer.eps",
        "optimizer.name",
        _among("adamw", "lamb", "muon"),
        "the optimizer is adamw, lamb or muon",
    ),
    _ignored(
        "schedule.decay_steps",
        "schedule.name",
        _among("linear", "cosine", "wsd"),
        "the schedule is linear, cosine or wsd",
    ),
    _ignored(
        "schedule.min_lr",
        "schedule.name",
        _among("linear", "cosine", "wsd", "inverse_sqrt"),
        "the learning rate falls",
    ),
    _ignored(
        "evaluation.early_stop_min_delta",
        "evaluation.early_stop_patience",
        lambda patience: patience is not None,
        "early_stop_patience is set",
    ),
    _ignored("evaluation.sample_tokens", "evaluation.prompts", bool, "there are prompts"),
    _ignored(
        "checkpoint.keep_last",
        "checkpoint.save_interval",
        bool,
        "checkpoints are saved during the run",
    ),
)


# Not built yet --------------------------------------------------------------------------------


def _not_built(path: str, built: tuple[object, ...], part: str) -> Check:
    """A setting that works with some of its values so far."""

    def run(config: Config, world_size: int | None) -> Iterator[Problem]:
        value = read_path(config, path)
        if value not in built:
            rule = f"{part.format(value)} not built yet in this version"
            works = " or ".join(show_value(choice).strip('"') for choice in built)
            yield Problem(path, value, rule, f"{path} = {works}")

    run.__name__ = f"not_built:{path}"
    return Check((path,), run)


_NOT_BUILT = (
    _not_built("model.family", ("gpt",), "the {} family is"),
    _not_built("parallel.pipeline_parallel_size", (1,), "pipeline parallelism is"),
    _not_built("parallel.virtual_pipeline_stages", (1,), "the interleaved pipeline is"),
    _not_built("parallel.pipeline_schedule", ("1f1b",), "the {} pipeline schedule is"),
    _not_built("parallel.context_parallel_size", (1,), "context parallelism is"),
)

_HEADS = ("model.hidden_size", "model.num_attention_heads")
_BATCH = ("train.global_batch_size", "train.micro_batch_size")
_LAYOUT = (
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.context_parallel_size",
)

DEFAULT_CHECKS: tuple[Check, ...] = (
    Check(_HEADS, heads_divide_hidden_size),
    Check(("model.num_attention_heads", "model.num_kv_heads"), kv_heads_divide_heads),
    Check((*_HEADS, "model.position_embedding"), rope_needs_even_head_width),
    Check(("schedule.min_lr", "optimizer.lr"), min_lr_below_lr),
    Check(("schedule.warmup_steps", "train.max_steps"), warmup_inside_run),
    Check(("schedule.name", "schedule.warmup_steps", "schedule.decay_steps"), decay_after_warmup),
    Check(
        (
            "schedule.name",
            "schedule.warmup_steps",
            "schedule.decay_steps",
            "train.max_steps",
        ),
        wsd_fits_run,
    ),
    Check(("schedule.name", "schedule.warmup_steps"), inverse_sqrt_needs_warmup),
    Check((*_BATCH, *_LAYOUT), micro_batch_divides_global),
    Check(_LAYOUT, world_size_fits_layout),
    Check((*_BATCH, *_LAYOUT), batch_fits_world_size),
    Check(
        ("data.split", "data.validation", "evaluation.prompts", *_ASKS_FOR_VALIDATION),
        validation_needs_split,
    ),
    Check(
        ("evaluation.interval", "evaluation.early_stop_patience", "evaluation.target_loss"),
        stopping_needs_interval,
    ),
    Check(("precision.dtype", *recipe_checks.LOSS_SCALE), recipe_checks.loss_scale_needs_fp16),
    Check(
        ("precision.dtype", *recipe_checks.LOSS_SCALE),
        recipe_checks.static_loss_scale_stands_alone,
    ),
    Check(
        (
            "precision.dtype",
            "precision.loss_scale",
            "precision.initial_loss_scale_power",
            "precision.min_loss_scale",
        ),
        recipe_checks.loss_scale_starts_in_bounds,
    ),
    Check(("train.batch_size_ramp", "train.global_batch_size"), recipe_checks.ramp_reaches_batch),
    Check(
        ("train.batch_size_ramp", "train.micro_batch_size", *_LAYOUT),
        recipe_checks.ramp_fits_micro_batch,
    ),
    Check(("evaluation.prompts", "model.family"), recipe_checks.prompts_need_gpt),
    Check(
        ("checkpoint.keep_best", "data.split", "data.validation", "evaluation.interval"),
        recipe_checks.best_is_a_metric,
    ),
    *_IGNORED,
    *_NOT_BUILT,
)
