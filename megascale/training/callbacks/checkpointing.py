"""Saving at an interval, on request, at the best validation, and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megascale.checkpoint.manager import CheckpointManager
from megascale.parallel.fragment import Fragment
from megascale.training.callbacks.base import Callback
from megascale.training.callbacks.save_requests import Asked, SaveRequests
from megascale.training.evaluation import EvaluationResult
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Writes checkpoints; must come last in the list, so that it saves the others' newest state.

    Args:
        manager: where to save.
        interval: steps between two checkpoints; 0: only at the end.
        constants: JSON values about the run that a resume compares or needs (data fingerprint).
        attachments: small files to store with each checkpoint.
        keep_best: SET_SCORE of the validation set and the score whose best step is saved, and
            never pruned; None: no step is better than another.
        requests: what else asks for a checkpoint; None: nothing does.
    """

    name = "checkpoint"

    def __init__(
        self,
        manager: CheckpointManager,
        interval: int,
        constants: Mapping[str, Any],
        attachments: Mapping[str, bytes],
        keep_best: str | None = None,
        requests: SaveRequests | None = None,
    ) -> None:
        self._manager = manager
        self._interval = interval
        self._constants = constants
        self._attachments = attachments
        self._keep_best = keep_best
        self._requests = requests
        self._best: float | None = None
        self._best_step = -1
        self._saved_step = -1

    def on_fit_start(self, trainer: Trainer) -> None:
        """The step that was resumed from is saved already."""
        self._saved_step = trainer.state.step
        if self._requests is not None:
            self._requests.start()

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """Remember the best step; it is saved when the step ends, or the run."""
        value = {f"{split}_{name}": x for name, x in result.scores.items()}.get(
            self._keep_best or ""
        )
        if value is None or not math.isfinite(value):  # NaN would never be undercut
            return
        sign = -1 if self._larger_is_better else 1
        if self._best is None or sign * value < sign * self._best:
            self._best, self._best_step = value, trainer.state.step

    @property
    def _larger_is_better(self) -> bool:
        """Of losses and perplexities the smallest is the best, of accuracies the largest."""
        return self._keep_best is not None and self._keep_best.endswith("_accuracy")

    def before_update(self, trainer: Trainer) -> None:
        """What is being saved beside training must be copied before it changes."""
        with _stopwatch(trainer):
            self._manager.wait_until_copied()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Every `interval` steps, where the validation was the best so far, and on request.

        Raises:
            UserError: a save in the background failed; on every rank after the same step.
        """
        asked = Asked()
        if self._requests is not None:
            asked = self._requests.agreed(self._manager.has_failed(), trainer.parts.device)
        if asked.failed:
            self._manager.finish()
        due = self._interval and result.step % self._interval == 0
        if due or asked.save or result.step == self._best_step:
            self._save(trainer)
        if asked.stop:
            trainer.stop(asked.stop)

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end, unless the last step is saved already; waits for the background."""
        if self._saved_step != trainer.state.step:
            self._save(trainer)
        self._manager.finish()

    def close(self) -> None:
        """Wait for the background, give the folder and the signals free."""
        self._manager.close()
        if self._requests is not None:
            self._requests.close()

    def state_dict(self) -> dict[str, Any]:
        """The best validation and its step."""
        if self._best is None:
            return {}
        return {"best_of": self._keep_best, "best": self._best, "best_step": self._best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback.load_state_dict`."""
        if state["best_of"] == self._keep_best:
            self._best, self._best_step = state["best"], int(state["best_step"])

    def _save(self, trainer: Trainer) -> None:
        engine = trainer.parts.engine
        state = {
            **self._constants,
            "train": trainer.state.state_dict(),
            "engine": engine.state_dict(),
            "callbacks": {c.name: c.state_dict() for c in trainer.callbacks if c.state_dict()},
        }
        step = trainer.state.step
        owned = _fragments(trainer, replicas=False)
        held = _fragments(trainer, replicas=True)
        over = " over a removed one" if self._manager.writes_over() else ""
        with _stopwatch(trainer):
            path = self._manager.save(
                step, owned, state, self._attachments, keep=self._best_step, replicas=held
            )
        self._saved_step = step
        if self._requests is not None:
            self._requests.saved()
        how = "is being saved" if self._manager.is_busy() else "saved"
        trainer.say(f"checkpoint of step {step}{over} {how} to {path}")


@contextmanager
def _stopwatch(trainer: Trainer) -> Iterator[None]:
    """Count the time within as time that training stood still."""
    started = time.perf_counter()
    yield
    trainer.checkpoint_s += time.perf_counter() - started


def _fragments(trainer: Trainer, replicas: bool) -> Iterator[Fragment]:
    engine = trainer.parts.engine
    yield from engine.fragments(engine.state_kinds, replicas=replicas)
    for callback in trainer.callbacks:
        yield from callback.fragments()
