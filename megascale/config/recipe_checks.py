"""Rules about precision, optimizers and recipes that join several settings; see checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.problems import Problem
from megascale.config.schema import Config, leaf_fields, read_path

DYNAMIC_SCALE = (
    "precision.initial_loss_scale_power",
    "precision.loss_scale_window",
    "precision.hysteresis",
    "precision.min_loss_scale",
)
LOSS_SCALE = ("precision.loss_scale", *DYNAMIC_SCALE)


def _changed(config: Config, paths: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """The settings among `paths` that differ from their defaults."""
    defaults = dict(leaf_fields())
    for path in paths:
        value = read_path(config, path)
        if value != defaults[path].default:
            yield path, value


def loss_scale_needs_fp16(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Only fp16's gradients are small enough to be lost."""
    if config.precision.dtype == "fp16":
        return
    for path, value in _changed(config, LOSS_SCALE):
        rule = f"has an effect only in fp16; precision.dtype is {config.precision.dtype}"
        yield Problem(path, value, rule, "leave it out, or precision.dtype=fp16")


def static_loss_scale_stands_alone(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What moves a dynamic scale does not move a static one."""
    precision = config.precision
    if precision.dtype != "fp16" or not precision.loss_scale:
        return
    for path, value in _changed(config, DYNAMIC_SCALE):
        rule = f"has an effect only when precision.loss_scale is 0, not {precision.loss_scale:g}"
        yield Problem(path, value, rule, "leave it out, or precision.loss_scale=0")


def loss_scale_starts_in_bounds(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The dynamic scale starts at or above its smallest value."""
    precision = config.precision
    if precision.dtype != "fp16" or precision.loss_scale:
        return
    initial = 2.0**precision.initial_loss_scale_power
    if precision.min_loss_scale > initial:
        rule = f"must be <= 2 ** precision.initial_loss_scale_power = {initial:g}"
        yield Problem("precision.min_loss_scale", precision.min_loss_scale, rule, "lower it")


def ramp_reaches_batch(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The ramp ends exactly at the global batch size."""
    ramp, total = config.train.batch_size_ramp, config.train.global_batch_size
    if ramp is None:
        return
    value = ramp.model_dump()
    if ramp.start >= total:
        rule = f"start must be < train.global_batch_size = {total}, else there is no ramp"
        yield Problem("train.batch_size_ramp", value, rule, "lower start, or leave the ramp out")
    elif (total - ramp.start) % ramp.increment:
        rule = (
            f"increment must divide train.global_batch_size - start = {total} - {ramp.start} = "
            f"{total - ramp.start}"
        )
        yield Problem("train.batch_size_ramp", value, rule, "for example increment = start")


def ramp_fits_micro_batch(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every step of the ramp is a whole number of micro-batches on every rank."""
    ramp, micro = config.train.batch_size_ramp, config.train.micro_batch_size
    if ramp is None:
        return
    group = config.parallel.model_parallel_size
    known = world_size is not None and world_size >= group and world_size % group == 0
    ranks = world_size // group if known and world_size is not None else 1
    unit = micro * ranks
    of_ranks = f" * data_parallel_size = {micro} * {ranks} = {unit}" if known else f" = {micro}"
    for name in ("start", "increment"):
        if getattr(ramp, name) % unit:
            rule = f"{name} must be a multiple of train.micro_batch_size{of_ranks}"
            hint = f"{name}: {-(-getattr(ramp, name) // unit) * unit}"
            yield Problem("train.batch_size_ramp", ramp.model_dump(), rule, hint)


def prompts_need_gpt(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Only a model that predicts the next token continues a text."""
    if config.evaluation.prompts and config.model.family != "gpt":
        rule = f"a {config.model.family} model does not continue texts"
        yield Problem("evaluation.prompts", list(config.evaluation.prompts), rule, "leave it out")


def scores(config: Config) -> list[str]:
    """What the validations of a run measure, as SET_SCORE: `EvaluationResult.scores` by set."""
    names = ["loss", "perplexity"]
    if config.model.family == "bert":
        names.append("masked_lm_accuracy")
        second = config.data.sentence_objective
        if second != "none":
            names += ["masked_lm_loss", f"{second}_loss", f"{second}_accuracy"]
    return [f"{split}_{name}" for split in config.data.validation_names for name in names]


def best_is_a_metric(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What is to be kept best is measured, more than once."""
    metric = config.checkpoint.keep_best
    if metric is None:
        return
    known = scores(config)
    if metric not in known:
        rule = "must be a score of a validation set"
        hint = f"one of {', '.join(known)}" if known else "give data.split a second part"
        yield Problem("checkpoint.keep_best", metric, rule, hint)
    elif not config.evaluation.interval:
        rule = "the best of a run is known only where it validates: evaluation.interval is 0"
        yield Problem(
            "checkpoint.keep_best", metric, rule, "evaluation.interval = 100, for example"
        )


def something_is_pruned(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A run that saves only at its end has one checkpoint."""
    checkpoint = config.checkpoint
    during = checkpoint.save_interval or checkpoint.keep_best or checkpoint.save_minutes
    if checkpoint.keep_last and not during:
        rule = "has an effect only when checkpoints are saved during the run; save_interval is 0"
        hint = "leave it out, or set save_interval, save_minutes or keep_best"
        yield Problem("checkpoint.keep_last", checkpoint.keep_last, rule, hint)
