"""Saving at an interval and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.checkpoint.manager import CheckpointManager
from megascale.training.callbacks.base import Callback
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Writes checkpoints; must come last in the list, so that it saves the others' newest state.

    Args:
        manager: where to save.
        interval: steps between two checkpoints; 0: only at the end.
        constants: JSON values about the run that a resume compares or needs (data fingerprint).
        attachments: small files to store with each checkpoint.
    """

    name = "checkpoint"

    def __init__(
        self,
        manager: CheckpointManager,
        interval: int,
        constants: Mapping[str, Any],
        attachments: Mapping[str, bytes],
    ) -> None:
        self._manager = manager
        self._interval = interval
        self._constants = constants
        self._attachments = attachments
        self._saved_step = -1

    def on_fit_start(self, trainer: Trainer) -> None:
        """The step that was resumed from is saved already."""
        self._saved_step = trainer.state.step

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Every `interval` steps."""
        if self._interval and result.step % self._interval == 0:
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end, unless the last step is saved already."""
        if self._saved_step != trainer.state.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        engine = trainer.parts.engine
        state = {
            **self._constants,
            "train": trainer.state.state_dict(),
            "engine": engine.state_dict(),
            "callbacks": {c.name: c.state_dict() for c in trainer.callbacks if c.state_dict()},
        }
        step = trainer.state.step
        path = self._manager.save(
            step, engine.fragments(engine.state_kinds), state, self._attachments
        )
        self._saved_step = step
        trainer.say(f"checkpoint of step {step} saved to {path}")
