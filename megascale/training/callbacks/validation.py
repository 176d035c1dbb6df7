"""Validation at an interval and at the end."""

from __future__ import annotations

from collections.abc import Sequence

from megascale.data.loader import EvaluationLoader
from megascale.training.callbacks.base import Callback
from megascale.training.evaluation import evaluate
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class ValidationCallback(Callback):
    """Evaluates on the validation split and tells the other callbacks.

    Args:
        loaders: the split's samples, one loader a corpus; empty when there is no such split.
        interval: steps between two validations; 0: only at the end.
    """

    name = "validation"

    def __init__(self, loaders: Sequence[EvaluationLoader], interval: int) -> None:
        self._loaders = loaders
        self._interval = interval
        self._last_step = -1

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Every `interval` steps, and at the last one, so that its line and checkpoint know."""
        due = self._interval and result.step % self._interval == 0
        if due or result.step == trainer.max_steps:
            self._validate(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        """After a run that was stopped early or resumed at its end, unless already validated."""
        if self._last_step != trainer.state.step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        if not self._loaders:
            return
        self._last_step = trainer.state.step
        parts = trainer.parts
        result = evaluate(parts.engine, self._loaders, parts.mesh, parts.device)
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, "valid", result)
