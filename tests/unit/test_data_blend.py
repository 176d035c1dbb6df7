"""Blends: exact shares, each source in its own order, and a pure function of the number."""

from __future__ import annotations

import numpy as np
import pytest

from megascale.data.blend import BLOCK_SIZE, BlendedDataset, Stage, block_quotas
from megascale.errors import UserError


class _Numbered:
    """Sample i of source s is the row [s, i]."""

    def __init__(self, source: int, seq_length: int = 2) -> None:
        self.source, self.seq_length = source, seq_length

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.stack([np.full_like(indices, self.source), indices], axis=1)
        return {"input_ids": rows, "labels": rows + 1}


def _blend(weights: list[float], seed: int = 0) -> BlendedDataset:
    sources = [_Numbered(source) for source in range(len(weights))]
    return BlendedDataset(sources, [Stage(0, tuple(range(len(weights))), tuple(weights))], seed)


def test_each_block_holds_exact_quotas_and_each_source_its_own_order() -> None:
    blend = _blend([0.7, 0.2, 0.1])
    rows = blend.batch(np.arange(2 * BLOCK_SIZE))["input_ids"]
    for block in range(2):
        sources = rows[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE, 0]
        assert (
            np.bincount(sources).tolist()
            == blend.mixtures[0].quotas.tolist()
            == [45875, 13107, 6554]
        )
    for source in range(3):
        numbers = rows[rows[:, 0] == source, 1]
        assert np.array_equal(numbers, np.arange(len(numbers)))


def test_a_sample_is_a_function_of_its_number() -> None:
    numbers = np.array([BLOCK_SIZE * 5 + 3, 0, 0, BLOCK_SIZE - 1, BLOCK_SIZE, 12])
    whole = _blend([1, 2]).batch(np.arange(BLOCK_SIZE + 1))
    some = _blend([1, 2]).batch(numbers)
    assert np.array_equal(some["input_ids"][1:], whole["input_ids"][numbers[1:]])
    assert np.array_equal(some["labels"], some["input_ids"] + 1)
    assert np.array_equal(_blend([1, 2]).locate(numbers)[0], some["input_ids"][:, 0])


def test_blocks_and_seeds_are_shuffled_differently() -> None:
    first, second = np.split(_blend([1, 1]).locate(np.arange(2 * BLOCK_SIZE))[0], 2)
    other = _blend([1, 1], seed=1).locate(np.arange(BLOCK_SIZE))[0]
    for a, b in ((first, second), (first, other)):
        assert 0.45 < (a == b).mean() < 0.55
    # Well mixed: every stretch of 4096 is near its share (six standard deviations).
    assert (abs(first.reshape(-1, 4096).mean(axis=1) - 0.5) < 6 * 0.5 / 64).all()


def test_quotas_add_up_and_only_ratios_matter() -> None:
    rng = np.random.default_rng(0)
    for sources in (1, 2, 7, 1000):
        weights = rng.uniform(0.1, 1, sources).tolist()
        quotas = block_quotas(weights)
        assert quotas.sum() == BLOCK_SIZE
        assert abs(quotas - np.array(weights) / sum(weights) * BLOCK_SIZE).max() < 1
        assert np.array_equal(quotas, block_quotas([4 * weight for weight in weights]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "weight 0 of source 1"),
        ([1, -2], "weight -2"),
        ([1, float("nan")], "weight nan"),
        ([float("inf"), 1], "weight inf"),
        ([1, 1e-9], "weight 1e-09 of source 1"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _blend(weights)


def test_sources_must_agree_in_length() -> None:
    with pytest.raises(UserError, match=r"\[2, 3\]"):
        BlendedDataset([_Numbered(0, 2), _Numbered(1, 3)], [Stage(0, (0, 1), (1, 1))], 0)
