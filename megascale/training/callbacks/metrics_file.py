"""metrics.jsonl: one JSON line a step, nothing twice after a resume."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from megascale.data.atomic_files import disk_errors, write_file
from megascale.training.callbacks.base import Callback
from megascale.training.evaluation import EvaluationResult
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class MetricsFileCallback(Callback):
    """Appends each step to `path`; the line of a validated step also has the validations.

    They are NAME_loss, NAME_perplexity, what else is measured, and NAME_tokens for each
    validation set.

    Must come after the validation in the list of callbacks.
    """

    name = "metrics_file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: Any = None
        self._evaluation: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Drop the lines after the step that the run resumes from."""
        if not trainer.parts.mesh.is_main:
            return
        with disk_errors(self._path):
            keep_until_step(self._path, trainer.state.step)
            self._stream = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def on_evaluation(self, trainer: Trainer, split: str, result: EvaluationResult) -> None:
        """Remember the validation for the line of this step."""
        self._evaluation |= {f"{split}_{name}": value for name, value in result.scores.items()}
        self._evaluation[f"{split}_tokens"] = result.tokens

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Write the step's line."""
        if self._stream is not None:
            line = {**asdict(result), **self._evaluation}
            safe = {k: _json_number(v) for k, v in line.items()}
            with disk_errors(self._path):
                self._stream.write(json.dumps(safe, allow_nan=False) + "\n")
        self._evaluation = {}

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            # what a full disk did not take is still buffered; that error was told already
            with suppress(OSError):
                self._stream.close()
            self._stream = None


def keep_until_step(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`, atomically; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue  # the process was killed while it wrote this line
    write_file(path, b"".join(line + b"\n" for line in kept))


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity: a skipped step's norm is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
