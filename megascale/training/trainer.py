"""The loop. Everything that is not the mathematics of a step is a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megascale.training.state import StepResult, TrainState
from megascale.training.step import StepParts, train_step

if TYPE_CHECKING:
    from megascale.training.callbacks.base import Callback


class Trainer:
    """Runs steps until `max_steps` or until a callback stops it.

    Args:
        parts: what a step works with.
        state: where the run stands; advanced in place.
        max_steps: total length of the run in optimizer steps.
        callbacks: called in this order.
        enrich: adds speed and memory to each step's result.
        say: prints one line to the user, on the main rank only.
    """

    def __init__(
        self,
        parts: StepParts,
        state: TrainState,
        max_steps: int,
        callbacks: Sequence[Callback],
        enrich: Callable[[Trainer, StepResult], StepResult],
        say: Callable[[str], None],
    ) -> None:
        self.parts = parts
        self.state = state
        self.max_steps = max_steps
        self.callbacks = callbacks
        self.say = say
        self.stop_reason: str | None = None
        self.checkpoint_s = 0.0  # see StepResult
        self._enrich = enrich

    def stop(self, reason: str) -> None:
        """End the run after this step; must be called on every rank alike."""
        self.stop_reason = reason

    def fit(self) -> None:
        """Train; callbacks are closed also after an error."""
        try:
            for callback in self.callbacks:
                callback.on_fit_start(self)
            while self.state.step < self.max_steps and self.stop_reason is None:
                result = train_step(self.parts, self.state, self._before_update)
                result = self._enrich(self, replace(result, checkpoint_s=self.checkpoint_s))
                self.checkpoint_s = 0.0
                for callback in self.callbacks:
                    callback.on_step_end(self, result)
            if self.stop_reason is not None:
                self.say(f"stopped at step {self.state.step}: {self.stop_reason}")
            for callback in self.callbacks:
                callback.on_fit_end(self)
        finally:
            for callback in self.callbacks:
                callback.close()
            self.parts.loader.close()

    def _before_update(self) -> None:
        for callback in self.callbacks:
            callback.before_update(self)
