"""Rules that join several settings, as a table of small functions.

A check tells which settings it reads; it is left out when one of them is invalid. Nothing here
changes a config. Two kinds: arithmetic that must come out even, and settings that would be ignored
beside others.
"""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config import recipe_checks
from megascale.config.bert_checks import BERT_CHECKS
from megascale.config.data_checks import DATA_CHECKS
from megascale.config.model_checks import MODEL_CHECKS
from megascale.config.problems import Problem
from megascale.config.rules import Check, divisors_near, neighbours
from megascale.config.rules import among as _among
from megascale.config.rules import either as _either
from megascale.config.rules import ignored as _ignored
from megascale.config.schema import Config, read_path

# Arithmetic -----------------------------------------------------------------------------------


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


_IGNORED = (
    *(
        _ignored(
            f"parallel.{name}",
            "parallel.tensor_parallel_size",
            lambda size: size != 1,
            "several ranks share a layer",
        )
        for name in ("sequence_parallel", "tensor_parallel_across_machines")
    ),
    *(
        _ignored(
            f"parallel.{name}",
            "parallel.pipeline_parallel_size",
            lambda size: size != 1,
            "several ranks share the layers",
        )
        for name in ("virtual_pipeline_stages", "pipeline_schedule", "layers_per_stage")
    ),
    _ignored(
        "parallel.context_parallel_method",
        "parallel.context_parallel_size",
        lambda size: size != 1,
        "several ranks share a sample",
    ),
    _ignored(
        "parallel.activation_memory_mb",
        "parallel.activation_recomputation",
        _among("auto"),
        "activation_recomputation is auto, which stays within it",
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
        "performance.fused_optimizer",
        "optimizer.name",
        _among("adamw", "sgd"),
        "the optimizer is adamw or sgd",
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
        "checkpoint.keep_every",
        "checkpoint.keep_last",
        lambda keep_last: keep_last is not None,
        "keep_last lets the others go",
    ),
    _ignored("checkpoint.init_optimizer", "checkpoint.init_from", bool, "init_from is given"),
)

_BATCH = ("train.global_batch_size", "train.micro_batch_size")
_LAYOUT = (
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.context_parallel_size",
)

DEFAULT_CHECKS: tuple[Check, ...] = (
    *MODEL_CHECKS,
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
        (
            *("checkpoint.keep_best", "evaluation.interval", "model.family"),
            *("data.split", "data.validation", "data.sentence_objective"),
        ),
        recipe_checks.best_is_a_metric,
    ),
    Check(
        (
            *("checkpoint.keep_last", "checkpoint.keep_best"),
            *("checkpoint.save_interval", "checkpoint.save_minutes"),
        ),
        recipe_checks.something_is_pruned,
    ),
    *_IGNORED,
    *BERT_CHECKS,
    *DATA_CHECKS,
)
