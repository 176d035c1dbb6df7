"""Ending a run by its validation loss."""

from __future__ import annotations

import math
from typing import Any

from megascale.training.callbacks.base import Callback
from megascale.training.evaluation import EvaluationResult
from megascale.training.trainer import Trainer


class EarlyStopCallback(Callback):
    """Stops when the validation loss stops falling, or when it reaches a target.

    Args:
        patience: validations without improvement before the run ends; None: never.
        min_delta: decrease that counts as improvement, nats per token.
        target_loss: loss at which the run ends; None: never.
    """

    name = "early_stop"

    def __init__(self, patience: int | None, min_delta: float, target_loss: float | None) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._target = target_loss
        self._best: float | None = None
        self._without_improvement = 0

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """The loss is the same on every rank, so all ranks decide alike."""
        finite = math.isfinite(result.loss)  # NaN would never be undercut
        if finite and (self._best is None or result.loss < self._best - self._min_delta):
            self._best, self._without_improvement = result.loss, 0
        else:
            self._without_improvement += 1
        if self._target is not None and result.loss <= self._target:
            trainer.stop(f"validation loss {result.loss:.4f} reached the target {self._target}")
        elif self._patience is not None and self._without_improvement >= self._patience:
            trainer.stop(
                f"no improvement of the validation loss below {self._shown_best()} "
                f"in {self._without_improvement} validations"
            )

    def _shown_best(self) -> str:
        return "any finite value" if self._best is None else f"{self._best:.4f}"

    def state_dict(self) -> dict[str, Any]:
        """Best loss and count of validations since."""
        return {"best": self._best, "without_improvement": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback.load_state_dict`."""
        self._best = state["best"]
        self._without_improvement = int(state["without_improvement"])
