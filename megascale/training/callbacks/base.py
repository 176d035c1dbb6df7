"""When a callback is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megascale.parallel.fragment import Fragment
from megascale.training.state import StepResult

if TYPE_CHECKING:
    from megascale.training.evaluation import EvaluationResult
    from megascale.training.trainer import Trainer


class Callback:
    """Base of all callbacks; each hook is called on every rank, in the order of the list."""

    name = "callback"

    def on_fit_start(self, trainer: Trainer) -> None:
        """Once, after a resume, before the first step."""

    def before_update(self, trainer: Trainer) -> None:
        """After the backward pass of each step, before weights and optimizer state change."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After each optimizer step."""

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """After each validation, from within some callback's `on_step_end` or `on_fit_end`."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Once, after the last step of a run that ended by itself."""

    def fragments(self) -> Iterator[Fragment]:
        """Tensors to save with a checkpoint beside the engine's; each part on one rank only."""
        return iter(())

    def close(self) -> None:
        """Always, also after an error: release files and threads."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values to save with a checkpoint; the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
