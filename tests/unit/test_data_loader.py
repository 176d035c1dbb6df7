"""Which rank gets which samples, and that prefetching changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megascale.data.loader import BatchLoader, EvaluationLoader
from megascale.errors import UserError


class _Numbered:
    seq_length = 3

    def __init__(self, length: int = 0, fails_at: int | None = None) -> None:
        self.length, self.fails_at = length, fails_at

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self.fails_at is not None and (indices >= self.fails_at).any():
            raise OSError("the disk went away")
        rows = np.repeat(indices[:, None], 3, axis=1)
        return {"input_ids": rows.copy(), "labels": rows + 1}


def _step_ids(dp_size: int, micro: int, start: int, prefetch: bool) -> list[int]:
    ids: list[int] = []
    for rank in range(dp_size):
        loader = BatchLoader(_Numbered(), 24, micro, rank, dp_size, prefetch=prefetch)
        micro_batches = loader.load(start)
        assert len(micro_batches) == loader.num_microbatches == 24 // (micro * dp_size)
        for batch in micro_batches:
            assert batch["input_ids"].shape == (micro, 3)
            assert batch["input_ids"].dtype == torch.int64
            assert torch.equal(batch["input_ids"][:, 0], batch["sample_ids"])
            ids += batch["sample_ids"].tolist()
        loader.close()
    return ids


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 24), (1, 1), (2, 3), (3, 4), (4, 6), (8, 3)])
def test_a_step_has_the_same_samples_in_every_layout(dp_size: int, micro: int) -> None:
    for start in (0, 24, 72, 5):
        assert _step_ids(dp_size, micro, start, True) == list(range(start, start + 24))


def test_prefetch_changes_nothing() -> None:
    with_thread = BatchLoader(_Numbered(), 8, 2, 1, 2)
    without = BatchLoader(_Numbered(), 8, 2, 1, 2, prefetch=False)
    for samples_seen in (0, 8, 16, 800, 808, 0, 8):  # in order, and jumping as after a resume
        for a, b in zip(with_thread.load(samples_seen), without.load(samples_seen), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
    with_thread.close()


def test_an_error_of_the_background_thread_is_raised_at_its_load() -> None:
    loader = BatchLoader(_Numbered(fails_at=8), 8, 4, 0, 1)
    assert len(loader.load(0)) == 2  # the failing prefetch of step 2 runs behind this
    with pytest.raises(OSError, match="the disk went away"):
        loader.load(8)
    assert loader.load(0)[0]["sample_ids"].tolist() == [0, 1, 2, 3]
    loader.close()


@pytest.mark.parametrize(("total", "micro", "dp"), [(10, 4, 2), (8, 3, 1), (0, 1, 1), (8, 0, 1)])
def test_sizes_that_do_not_divide_are_refused_with_the_equation(
    total: int, micro: int, dp: int
) -> None:
    with pytest.raises(UserError, match=f"global_batch_size {total} = .*{micro} x .*{dp} x"):
        BatchLoader(_Numbered(), total, micro, 0, dp)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize(("length", "max_samples"), [(1, None), (12, None), (13, None), (13, 5)])
def test_evaluation_gives_each_sample_once_and_each_rank_as_many_batches(
    dp_size: int, length: int, max_samples: int | None
) -> None:
    seen: list[int] = []
    counts = set()
    for rank in range(dp_size):
        loader = EvaluationLoader(_Numbered(length), 2, rank, dp_size, max_samples)
        batches = list(loader)
        assert len(batches) == len(loader)
        counts.add(len(batches))
        for batch in batches:
            assert batch["input_ids"].shape == (2, 3)
            real = batch["sample_ids"] >= 0
            assert (batch["labels"][~real] == -100).all()
            assert (batch["labels"][real] == batch["sample_ids"][real, None] + 1).all()
            seen += batch["sample_ids"][real].tolist()
    assert len(counts) == 1
    count = length if max_samples is None else max_samples
    assert sorted(seen) == [number * length // count for number in range(count)]
