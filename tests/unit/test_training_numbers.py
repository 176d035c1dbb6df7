"""What a step and an evaluation report, and how the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megascale.data.batch_size import BatchSizeSchedule
from megascale.data.ledger import SourceCount
from megascale.engine.protocol import MicroBatch, StepOutcome
from megascale.errors import UserError
from megascale.training.evaluation import EvaluationResult, evaluate
from megascale.training.generation import Sampling, choose, generate
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step

CPU = torch.device("cpu")


class _Mesh:
    """A group in which every rank holds the same as this one."""

    cp_rank, cp_size = 0, 1

    def __init__(self, dp_size: int = 1) -> None:
        self.dp_size = dp_size

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.dp_size


# Evaluation -----------------------------------------------------------------------------------


class _Scorer:
    """A model whose loss on a target is its id / 10."""

    module: Any = SimpleNamespace(objectives=("next_token",))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, ...]]:
        return [self.score(micro_batch) for micro_batch in micro_batches]

    def score(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        labels = micro_batch["labels"]
        real = labels[labels != -100]
        return real.sum() / 10, torch.tensor(real.numel())


def _evaluate(dp_size: int, lengths: np.ndarray | None) -> EvaluationResult:
    batches = [
        {"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])},
        {"labels": torch.tensor([[4, 4, 4], [-100, -100, -100]])},
    ]
    loaders: Any = [batches, [batches[0]]]
    mesh: Any = _Mesh(dp_size)
    return evaluate(_Scorer(), loaders, mesh, CPU, lengths)


def test_the_loss_is_the_mean_over_targets_not_over_batches() -> None:
    result = _evaluate(1, None)
    assert result.tokens == 9
    assert result.loss == pytest.approx((6 + 12 + 6) / 10 / 9)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte is None


def test_ranks_are_summed_and_bytes_are_those_of_the_targets() -> None:
    result = _evaluate(2, np.array([100, 1, 2, 3, 5]))
    assert result.tokens == 18
    assert result.utf8_bytes == 2 * (6 + 15 + 6)
    assert result.loss == pytest.approx(_evaluate(1, None).loss)
    assert result.bits_per_byte == pytest.approx(result.loss * 18 / math.log(2) / 54)
    assert result.metrics == {}


class _TwoObjectives(_Scorer):
    """Also a loss of 2 for each sentence; half of the tokens and all sentences are right."""

    module: Any = SimpleNamespace(objectives=("masked_lm", "sop"))

    def score(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        loss, count = super().score(micro_batch)
        sentences = (micro_batch["sentence_labels"] != -100).sum()
        sums = torch.stack((loss, 2.0 * sentences))
        return sums, torch.stack((count, sentences)), torch.stack((count // 2, sentences))


def test_each_objective_has_its_own_mean_and_accuracy() -> None:
    batches = [
        {"labels": torch.tensor([[1, 2], [5, -100]]), "sentence_labels": torch.tensor([0, 1])},
        {
            "labels": torch.tensor([[4, -100], [-100, -100]]),
            "sentence_labels": torch.tensor([0, -100]),
        },
    ]
    loaders: Any = [batches]
    mesh: Any = _Mesh(3)
    result = evaluate(_TwoObjectives(), loaders, mesh, CPU)
    assert result.metrics == pytest.approx(
        {"masked_lm_loss": 0.3, "sop_loss": 2.0, "masked_lm_accuracy": 0.25, "sop_accuracy": 1.0}
    )
    assert result.loss == pytest.approx(2.3)
    assert result.perplexity == pytest.approx(math.exp(0.3))
    assert result.tokens == 12


def test_an_evaluation_in_bits() -> None:
    # one token a byte and a loss of ln 2 nats is one bit a byte
    assert EvaluationResult(math.log(2), 8, 8).bits_per_byte == pytest.approx(1.0)
    assert EvaluationResult(math.log(256), 8, 8).perplexity == pytest.approx(256)
    assert EvaluationResult(1e4, 8, 8).perplexity == math.inf
    assert EvaluationResult(0.0, 0, 0).bits_per_byte is None


# One step -------------------------------------------------------------------------------------


class _Engine:
    """Remembers what it is asked; its loss sum is 2 nats a target."""

    def __init__(self, loss: float = 2.0, skips: bool = False) -> None:
        self._loss, self._skips = loss, skips
        self.total_targets: list[float] = []
        self.rates: list[float] = []

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: float
    ) -> torch.Tensor:
        self.total_targets.append(total_targets)
        targets = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        return torch.tensor(self._loss * targets)

    def step(self, lr: float) -> StepOutcome:
        self.rates.append(lr)
        return StepOutcome(grad_norm=1.5, skipped=self._skips, loss_scale=8.0)


class _Loader:
    batch_size: BatchSizeSchedule

    def __init__(self) -> None:
        self.asked: list[int] = []

    def load(self, samples_seen: int) -> list[dict[str, torch.Tensor]]:
        self.asked.append(samples_seen)
        return [
            {"labels": torch.tensor([[1, 2], [3, -100]])},
            {"labels": torch.tensor([[-100, -100], [5, -100]])},
        ]


def _parts(engine: _Engine, loader: _Loader, dp_size: int = 1) -> StepParts:
    loader.batch_size = BatchSizeSchedule(4 * dp_size)
    parts: Any = SimpleNamespace(
        engine=engine,
        loader=loader,
        schedule=SimpleNamespace(lr_at=lambda step: 0.1 * (step + 1)),
        mesh=_Mesh(dp_size),
        device=CPU,
        ledger=SimpleNamespace(at=lambda samples: {"a": SourceCount(samples, 2 * samples, 0.0)}),
    )
    return parts


@pytest.mark.parametrize("dp_size", [1, 3])
def test_a_step_normalises_by_the_targets_of_the_global_batch(dp_size: int) -> None:
    engine, loader, state = _Engine(), _Loader(), TrainState()
    parts = _parts(engine, loader, dp_size)
    first, second = train_step(parts, state), train_step(parts, state)
    assert engine.total_targets == [4.0 * dp_size] * 2  # not per micro-batch, not per rank
    assert first.loss == pytest.approx(2.0)
    assert engine.rates == pytest.approx([0.1, 0.2])
    assert loader.asked == [0, 4 * dp_size]
    assert (first.step, first.samples_seen, first.tokens_seen) == (1, 4 * dp_size, 8 * dp_size)
    assert (second.step, second.samples_seen) == (2, 8 * dp_size)
    assert second.tokens_per_second == pytest.approx(8 * dp_size / second.step_time_s)
    assert (first.grad_norm, first.loss_scale, first.skipped) == (1.5, 8.0, False)
    assert state == TrainState(2, 2, 8 * dp_size, 16 * dp_size)


def test_a_skipped_step_moves_the_data_but_counts_no_update() -> None:
    state = TrainState()
    result = train_step(_parts(_Engine(skips=True), _Loader()), state)
    assert result.skipped
    assert state == TrainState(step=1, updates=0, samples_seen=4, tokens_seen=8)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(loss: float) -> None:
    engine, state = _Engine(loss), TrainState(step=4, samples_seen=16)
    with pytest.raises(UserError, match="loss of step 5"):
        train_step(_parts(engine, _Loader()), state)
    assert engine.rates == []
    assert state == TrainState(step=4, samples_seen=16)


def test_the_state_goes_through_json() -> None:
    state = TrainState(3, 2, 12, 96)
    assert TrainState.from_dict(state.state_dict()) == state


# The next token -------------------------------------------------------------------------------

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.3]))


def _frequencies(sampling: Sampling, count: int = 4000) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    drawn = [choose(LOGITS, sampling, generator) for _ in range(count)]
    return np.bincount(drawn, minlength=4) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.05, 0.4, 0.25, 0.3]),
        (Sampling(1.0, top_k=99), [0.05, 0.4, 0.25, 0.3]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=1), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.71), [0, 0.4 / 0.95, 0.25 / 0.95, 0.3 / 0.95]),
        (Sampling(1.0, top_p=0.01), [0, 1, 0, 0]),  # never an empty set
        (Sampling(1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(0.5, top_k=2), [0, 16 / 25, 0, 9 / 25]),
        (Sampling(0.0), [0, 1, 0, 0]),
    ],
)
def test_how_often_tokens_are_chosen(sampling: Sampling, expected: list[float]) -> None:
    found = _frequencies(sampling)
    assert found == pytest.approx(np.array(expected), abs=0.03)
    assert (found[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": math.nan},
        {"top_p": math.nan},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="temperature >= 0"):
        Sampling(**wrong)


def _generate(next_logits: Any, **changes: Any) -> list[int]:
    arguments: dict[str, Any] = {
        "max_new_tokens": 5,
        "context_length": 3,
        "eod_id": 9,
        "sampling": Sampling(0.0),
        "seed": 0,
        "device": CPU,
    }
    return generate(next_logits, [1, 2], **{**arguments, **changes})


def test_generation_feeds_back_within_the_context_and_stops_at_the_end_of_document() -> None:
    windows: list[list[int]] = []

    def successor(ids: torch.Tensor) -> torch.Tensor:
        windows.append(ids[0].tolist())
        return torch.nn.functional.one_hot(ids[0, -1] + 1, 12).float()

    assert _generate(successor) == [3, 4, 5, 6, 7]
    assert windows == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert _generate(successor, max_new_tokens=50) == [3, 4, 5, 6, 7, 8]
    assert _generate(successor, eod_id=None, max_new_tokens=8)[-1] == 10


def test_the_same_seed_gives_the_same_text() -> None:
    def flat(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(8)

    texts = [_generate(flat, sampling=Sampling(1.0), seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
