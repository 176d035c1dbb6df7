"""What a person watching the run sees."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from megascale.training.callbacks.base import Callback
from megascale.training.evaluation import EvaluationResult
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class ConsoleCallback(Callback):
    """A progress bar and a line every `interval` steps; plain lines when not a terminal."""

    name = "console"

    def __init__(self, console: Console, interval: int) -> None:
        self._console = console
        self._interval = interval
        self._progress: Progress | None = None
        self._started = 0.0
        self._first_step = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._started = time.monotonic()
        self._first_step = trainer.state.step
        if not trainer.parts.mesh.is_main or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.add_task("steps", total=trainer.max_steps, completed=trainer.state.step)
        self._progress.start()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Move the bar; print a line at the interval, at the first and at the last step."""
        if not trainer.parts.mesh.is_main:
            return
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=result.step)
        first = result.step == self._first_step + 1
        if first or result.step % self._interval == 0 or result.step == trainer.max_steps:
            self._console.print(self._line(trainer, result), highlight=False, soft_wrap=True)

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """Print the validation."""
        if trainer.parts.mesh.is_main:
            self._console.print(
                f"step {trainer.state.step:>6}  {split} loss {result.loss:.4f}  "
                f"perplexity {result.perplexity:.2f}  ({result.tokens:,} tokens)"
                + "".join(f"  {name} {value:.4f}" for name, value in result.metrics.items()),
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, trainer: Trainer, result: StepResult) -> str:
        done = result.step - self._first_step
        left = (time.monotonic() - self._started) / done * (trainer.max_steps - result.step)
        parts = [
            f"step {result.step:>6}/{trainer.max_steps}",
            f"loss {result.loss:.4f}",
            f"lr {result.lr:.2e}",
            f"grad norm {result.grad_norm:.3f}",
            f"{result.tokens_per_second:,.0f} tok/s",
        ]
        if result.mfu is not None:
            parts.append(f"MFU {100 * result.mfu:.0f}%")
        if result.memory_bytes is not None:
            parts.append(f"{result.memory_bytes / 2**20:,.0f} MiB")
        if result.skipped:
            parts.append("SKIPPED")
        parts.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
        return "  ".join(parts)
