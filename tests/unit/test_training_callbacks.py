"""The callbacks' own logic: metrics file, early stop, validation and checkpoint intervals."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megascale.errors import DiskFullError
from megascale.training.callbacks.checkpointing import CheckpointCallback
from megascale.training.callbacks.early_stop import EarlyStopCallback
from megascale.training.callbacks.metrics_file import MetricsFileCallback, keep_until_step
from megascale.training.evaluation import EvaluationResult
from megascale.training.state import StepResult, TrainState

RESULT = StepResult(
    step=1,
    loss=2.0,
    lr=0.1,
    grad_norm=3.0,
    global_batch_size=4,
    samples_seen=4,
    tokens_seen=64,
    step_time_s=0.5,
    tokens_per_second=128.0,
    loss_scale=1.0,
    skipped=False,
)


class _Trainer:
    """What callbacks see of a trainer."""

    def __init__(self, step: int = 0, is_main: bool = True) -> None:
        self.state = TrainState(step=step, updates=step)
        self.engine = SimpleNamespace(
            state_kinds=("master",),
            fragments=lambda kinds, replicas: [],
            state_dict=lambda: {"count": 1.0},
        )
        self.parts = SimpleNamespace(mesh=SimpleNamespace(is_main=is_main), engine=self.engine)
        self.callbacks: list[Any] = []
        self.stop_reason: str | None = None
        self.checkpoint_s = 0.0
        self.said: list[str] = []

    def stop(self, reason: str) -> None:
        self.stop_reason = reason

    def say(self, text: str) -> None:
        self.said.append(text)


# metrics.jsonl --------------------------------------------------------------------------------


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", []),
        ('{"step": 1}\n{"step": 2}\n', [1, 2]),
        ('{"step": 2}\n{"step": 3}\n{"step": 4}\n', [2]),
        ('{"step": 1}\n{"step": 2, "lo', [1]),  # torn by a kill
        ('{"step": 1}\n\n{"step": 2}', [1, 2]),
        ('{"step": 1}\nnull\n[]\n{"loss": 3}\n{"step": "x"}\n{"step": 2}\n', [1, 2]),
        ('{"step": 1}\n\x00\x00\x00\x00', [1]),  # a file system after a power cut
    ],
)
def test_what_a_resume_keeps(tmp_path: Path, text: str, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    keep_until_step(path, 2)
    assert [line["step"] for line in _lines(path)] == kept
    assert path.read_text() == "" or path.read_text().endswith("\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_is_no_problem(tmp_path: Path) -> None:
    keep_until_step(tmp_path / "metrics.jsonl", 2)
    assert not list(tmp_path.iterdir())


def test_a_validation_belongs_to_the_line_of_its_step(tmp_path: Path) -> None:
    callback, trainer = MetricsFileCallback(tmp_path / "metrics.jsonl"), _Trainer()
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    callback.on_evaluation(trainer, "valid", EvaluationResult(1.5, 10, 0))  # type: ignore[arg-type]
    callback.on_step_end(trainer, RESULT)  # type: ignore[arg-type]
    callback.on_step_end(trainer, replace(RESULT, step=2, grad_norm=float("inf"), skipped=True))  # type: ignore[arg-type]
    first, second = _lines(tmp_path / "metrics.jsonl")  # readable while the run goes on
    assert first["valid_loss"] == 1.5
    assert first["valid_tokens"] == 10
    assert "valid_loss" not in second
    assert second["grad_norm"] is None  # JSON has no infinity
    assert second["skipped"] is True
    callback.close()
    callback.close()


def test_only_the_main_rank_writes_metrics(tmp_path: Path) -> None:
    callback, trainer = MetricsFileCallback(tmp_path / "metrics.jsonl"), _Trainer(is_main=False)
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    callback.on_step_end(trainer, RESULT)  # type: ignore[arg-type]
    callback.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    callback = MetricsFileCallback(tmp_path / "metrics.jsonl")
    callback._stream = Full()
    with pytest.raises(DiskFullError, match=r"no space to write .*metrics\.jsonl"):
        callback.on_step_end(_Trainer(), RESULT)  # type: ignore[arg-type]
    callback.close()  # hides nothing and raises nothing new


# Early stop -----------------------------------------------------------------------------------


def _stops_after(callback: EarlyStopCallback, losses: list[float]) -> int | None:
    """Number of the validation at which the run is stopped."""
    trainer = _Trainer()
    for number, loss in enumerate(losses, start=1):
        callback.on_evaluation(trainer, "valid", EvaluationResult(loss, 1, 0))  # type: ignore[arg-type]
        if trainer.stop_reason is not None:
            return number
    return None


@pytest.mark.parametrize(
    ("patience", "min_delta", "target", "losses", "expected"),
    [
        (None, 0.0, None, [3.0, 4.0, 5.0, 6.0], None),
        (1, 0.0, None, [3.0, 3.0], 2),
        (2, 0.0, None, [3.0, 3.1, 2.9, 2.9, 3.0], 5),
        (2, 0.0, None, [3.0, 2.9, 2.8, 2.7], None),
        (1, 0.5, None, [3.0, 2.4, 2.0], 3),  # a decrease of 0.4 is not enough
        (2, 0.5, None, [3.0, 2.7, 2.4, 2.3], None),  # counted from the best that counted: 3.0, 2.4
        (None, 0.0, 2.0, [3.0, 2.1, 2.0], 3),
        (1, 0.0, 2.0, [3.0, 3.0, 1.0], 2),
    ],
)
def test_when_a_run_stops(
    patience: int | None,
    min_delta: float,
    target: float | None,
    losses: list[float],
    expected: int | None,
) -> None:
    assert _stops_after(EarlyStopCallback(patience, min_delta, target), losses) == expected


def test_a_loss_that_is_not_a_number_is_no_improvement() -> None:
    assert _stops_after(EarlyStopCallback(1, 0.0, None), [3.0, float("nan")]) == 2
    assert _stops_after(EarlyStopCallback(2, 0.0, None), [float("nan"), 3.0, 2.0, 1.0]) is None
    assert _stops_after(EarlyStopCallback(2, 0.0, None), [float("nan"), float("inf")]) == 2


def test_patience_goes_on_after_a_resume() -> None:
    losses = [3.0, 2.0, 2.5, 2.6, 2.7]
    whole = EarlyStopCallback(3, 0.0, None)
    assert _stops_after(whole, losses) == 5
    for cut in range(1, 5):
        before, after = EarlyStopCallback(3, 0.0, None), EarlyStopCallback(3, 0.0, None)
        assert _stops_after(before, losses[:cut]) is None
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert _stops_after(after, losses[cut:]) == 5 - cut


# Checkpoint intervals -------------------------------------------------------------------------


class _Manager:
    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []

    def save(
        self,
        step: int,
        fragments: Any,
        state: dict[str, Any],
        attachments: Any,
        keep: int | None = None,
        replicas: Any = (),
    ) -> str:
        self.saved.append((step, state))
        return f"step_{step}"

    def is_busy(self) -> bool:
        return False

    def writes_over(self) -> bool:
        return False

    def finish(self) -> None:
        pass


def _save_steps(interval: int, first: int, last: int) -> list[int]:
    manager, trainer = _Manager(), _Trainer(step=first)
    callback = CheckpointCallback(manager, interval, {}, {})  # type: ignore[arg-type]
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    for step in range(first + 1, last + 1):
        trainer.state.step = step
        callback.on_step_end(trainer, replace(RESULT, step=step))  # type: ignore[arg-type]
    callback.on_fit_end(trainer)  # type: ignore[arg-type]
    assert len(trainer.said) == len(manager.saved)
    return [step for step, _ in manager.saved]


@pytest.mark.parametrize(
    ("interval", "first", "last", "expected"),
    [
        (2, 0, 5, [2, 4, 5]),
        (2, 0, 4, [2, 4]),  # the last one is not saved twice
        (0, 0, 4, [4]),
        (3, 3, 7, [6, 7]),
        (3, 6, 6, []),  # nothing was trained after the resume
    ],
)
def test_when_checkpoints_are_saved(
    interval: int, first: int, last: int, expected: list[int]
) -> None:
    assert _save_steps(interval, first, last) == expected


def test_what_a_checkpoint_says_about_the_run() -> None:
    manager, trainer = _Manager(), _Trainer(step=3)
    early = EarlyStopCallback(3, 0.0, None)
    _stops_after(early, [2.0])
    callback = CheckpointCallback(manager, 1, {"seed": 7}, {})  # type: ignore[arg-type]
    trainer.callbacks = [early, callback]
    callback.on_step_end(trainer, replace(RESULT, step=3))  # type: ignore[arg-type]
    assert manager.saved[0][1] == {
        "seed": 7,
        "train": {"step": 3, "updates": 3, "samples_seen": 0, "tokens_seen": 0},
        "engine": {"count": 1.0},
        "callbacks": {"early_stop": {"best": 2.0, "without_improvement": 0}},
    }


@pytest.mark.parametrize(
    ("keep_best", "expected"),
    [
        ("valid_loss", 3),
        ("valid_perplexity", 3),
        ("valid_masked_lm_accuracy", 2),  # the larger the better
        ("other_loss", 4),
        ("valid_absent", -1),
    ],
)
def test_the_best_step_is_that_of_the_score(keep_best: str, expected: int) -> None:
    manager = _Manager()
    callback = CheckpointCallback(manager, 0, {}, {}, keep_best)  # type: ignore[arg-type]
    nan = float("nan")
    values = [(nan, nan, 9.0), (3.0, 0.5, 8.0), (2.0, 0.4, 7.0), (2.5, 0.5, 6.0)]
    for step, (loss, accuracy, other) in enumerate(values, start=1):
        trainer = _Trainer(step=step)
        metrics = {"masked_lm_accuracy": accuracy}
        callback.on_evaluation(trainer, "valid", EvaluationResult(loss, 1, 0, metrics))  # type: ignore[arg-type]
        callback.on_evaluation(trainer, "other", EvaluationResult(other, 1, 0))  # type: ignore[arg-type]
    state = callback.state_dict()
    assert state.get("best_step", -1) == expected
    again = CheckpointCallback(manager, 0, {}, {}, keep_best)  # type: ignore[arg-type]
    if state:
        again.load_state_dict(state)
    assert again.state_dict() == state
    other = CheckpointCallback(manager, 0, {}, {}, "train_loss")  # type: ignore[arg-type]
    if state:
        other.load_state_dict(state)  # the best by another score says nothing
    assert other.state_dict() == {}
