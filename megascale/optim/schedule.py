"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megascale.errors import UserError


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate of each optimizer update.

    Warm-up: update k (the first is 0) has lr * (k + 1) / warmup_steps, so update warmup_steps - 1
    is the first at ``lr``. After it:

    - constant: ``lr``; ``min_lr`` has no part in it.
    - linear, cosine (arXiv:1608.03983, without restarts): from ``lr`` at step warmup_steps to
      ``min_lr`` at step ``decay_steps`` (default max_steps), then ``min_lr``.
    - wsd (warm-up, stable, decay; arXiv:2404.06395): ``lr``, then in the last ``decay_steps``
      steps (default a tenth of max_steps) linearly down to ``min_lr`` at step max_steps.
    - inverse_sqrt (arXiv:1706.03762): lr * sqrt(warmup_steps / (step + 1)), not below ``min_lr``;
      without warm-up as if warmup_steps were 1.

    Raises:
        UserError: an unknown name, rates out of order, or spans that do not fit into the run.
    """

    name: str
    lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        _check_rates(self)
        _check_spans(self)

    def lr_at(self, step: int) -> float:
        """Learning rate of update ``step`` (0 is the first); steps after max_steps are allowed."""
        assert step >= 0, step
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        return _AFTER_WARMUP[self.name](self, step)

    def _between(self, fraction: float) -> float:
        """``lr`` at fraction 1, ``min_lr`` at fraction 0."""
        return self.min_lr + (self.lr - self.min_lr) * fraction

    def _progress(self, step: int) -> float:
        """Part of the decay that is over, for schedules that decay from the end of the warm-up."""
        end = self.max_steps if self.decay_steps is None else self.decay_steps
        return min(1.0, (step - self.warmup_steps) / max(1, end - self.warmup_steps))


def _constant(schedule: LearningRateSchedule, step: int) -> float:
    return schedule.lr


def _linear(schedule: LearningRateSchedule, step: int) -> float:
    return schedule._between(1.0 - schedule._progress(step))


def _cosine(schedule: LearningRateSchedule, step: int) -> float:
    return schedule._between(0.5 * (1.0 + math.cos(math.pi * schedule._progress(step))))


def _wsd_decay_steps(schedule: LearningRateSchedule) -> int:
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    return max(1, round(0.1 * schedule.max_steps))


def _wsd(schedule: LearningRateSchedule, step: int) -> float:
    remaining = (schedule.max_steps - step) / _wsd_decay_steps(schedule)
    return schedule._between(min(1.0, max(0.0, remaining)))


def _inverse_sqrt(schedule: LearningRateSchedule, step: int) -> float:
    rate = schedule.lr * math.sqrt(max(1, schedule.warmup_steps) / (step + 1))
    return max(schedule.min_lr, rate)


_AFTER_WARMUP: dict[str, Callable[[LearningRateSchedule, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
SCHEDULE_NAMES: tuple[str, ...] = tuple(_AFTER_WARMUP)


def _check_rates(schedule: LearningRateSchedule) -> None:
    if schedule.name not in SCHEDULE_NAMES:
        raise UserError(
            f"schedule {schedule.name!r}",
            rule=f"a schedule is one of {', '.join(SCHEDULE_NAMES)}",
            remedy="choose one of these for schedule.name",
        )
    if not (0 < schedule.lr < math.inf and 0 <= schedule.min_lr <= schedule.lr):
        raise UserError(
            f"lr={schedule.lr}, min_lr={schedule.min_lr}",
            rule="0 <= min_lr <= lr, and lr is positive and finite",
            remedy="raise optimizer.lr or lower schedule.min_lr",
        )


def _check_spans(schedule: LearningRateSchedule) -> None:
    name, warmup, end = schedule.name, schedule.warmup_steps, schedule.max_steps
    if end < 1 or not 0 <= warmup <= end:
        raise UserError(
            f"warmup_steps={warmup}, max_steps={end}",
            rule="0 <= warmup_steps <= max_steps, and max_steps is at least 1",
            remedy="shorten schedule.warmup_steps or lengthen train.max_steps",
        )
    given = schedule.decay_steps
    if given is not None and name in ("constant", "inverse_sqrt"):
        raise UserError(
            f"decay_steps={given} with the {name} schedule",
            rule=f"{name} has no decay span",
            remedy="leave schedule.decay_steps out, or choose linear, cosine or wsd",
        )
    if given is not None and name in ("linear", "cosine") and given < max(1, warmup):
        raise UserError(
            f"decay_steps={given}, warmup_steps={warmup}",
            rule=f"{name} reaches min_lr at step decay_steps, at least 1 and not before the "
            "warm-up ends",
            remedy="raise schedule.decay_steps or lower schedule.warmup_steps",
        )
    decay = _wsd_decay_steps(schedule)
    if name == "wsd" and (decay < 1 or warmup + decay > end):
        raise UserError(
            f"warmup_steps={warmup}, decay_steps={decay}, max_steps={end}",
            rule="for wsd decay_steps is at least 1 and warmup_steps + decay_steps <= max_steps",
            remedy="shorten the warm-up or the decay, or lengthen train.max_steps",
        )
