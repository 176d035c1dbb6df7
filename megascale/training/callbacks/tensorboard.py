"""Scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megascale.data.atomic_files import disk_errors
from megascale.training.callbacks.base import Callback
from megascale.training.evaluation import EvaluationResult
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer

_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "global_batch_size": "train/global_batch_size",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_bytes": "memory/bytes",
    "checkpoint_s": "speed/checkpoint_s",
}


class TensorBoardCallback(Callback):
    """Writes each step's scalars below `folder`, on the main rank."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the writer; events of steps after the resume point are purged."""
        if trainer.parts.mesh.is_main:
            # imported here: it costs a second that only the main rank should pay
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=trainer.state.step + 1)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Add the step's scalars."""
        if self._writer is None:
            return
        with disk_errors(self._folder):
            for field, tag in _TAGS.items():
                value = getattr(result, field)
                if value is not None:
                    self._writer.add_scalar(tag, value, result.step)
            for name, count in result.sources.items():
                self._writer.add_scalar(f"tokens/{name}", count.tokens, result.step)
                self._writer.add_scalar(f"epochs/{name}", count.epochs, result.step)

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """Add the validation's loss and perplexity, and the task's own metrics."""
        if self._writer is not None:
            for name, value in result.scores.items():
                self._writer.add_scalar(f"{split}/{name}", value, trainer.state.step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with disk_errors(self._folder):
                writer.close()
