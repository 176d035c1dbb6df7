from __future__ import annotations

import numpy as np
import pytest

from megascale.config.schema import BatchSizeRamp, TrainConfig
from megascale.data.batch_size import BatchSizeSchedule, batch_size_schedule
from megascale.data.loader import BatchLoader

RAMP = BatchSizeSchedule(final=16, start=4, increment=4, samples=60)  # 20 samples an increase


def test_without_a_ramp_it_is_constant() -> None:
    schedule = batch_size_schedule(TrainConfig(global_batch_size=24))
    assert [schedule.at(seen) for seen in (0, 1, 10**12)] == [24] * 3
    assert schedule.samples_after(7) == 7 * 24


@pytest.mark.parametrize(
    ("seen", "size"),
    [(0, 4), (4, 4), (19, 4), (20, 8), (39, 8), (40, 12), (59, 12), (60, 16), (10**9, 16)],
)
def test_megatron_s_rule_by_hand(seen: int, size: int) -> None:
    assert RAMP.at(seen) == size


def test_megatron_s_rule_for_many_sizes() -> None:
    """start + int(consumed / (samples / increases)) * increment, in exact arithmetic."""
    for final, start, increment, samples in ((512, 32, 32, 1000), (96, 8, 8, 7), (10, 9, 1, 3)):
        schedule = BatchSizeSchedule(final, start, increment, samples)
        increases = (final - start) // increment
        sizes = [schedule.at(seen) for seen in range(samples + 5)]
        assert sizes[0] == start
        assert sizes[samples:] == [final] * 5
        assert sizes == sorted(sizes)
        for seen in range(samples):
            below = (sizes[seen] - start) // increment
            assert below * samples <= seen * increases < (below + 1) * samples


def test_samples_after_is_the_sum_of_the_steps() -> None:
    seen = 0
    for step in range(30):
        assert RAMP.samples_after(step) == seen
        seen += RAMP.at(seen)


class _Numbers:
    def batch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": ids[:, None]}


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_order_of_samples_is_that_without_a_ramp(dp_size: int, prefetch: bool) -> None:
    ramp = TrainConfig(
        global_batch_size=16, batch_size_ramp=BatchSizeRamp(start=4, increment=4, samples=60)
    )
    schedule = batch_size_schedule(ramp)
    assert schedule == RAMP
    loaders = [BatchLoader(_Numbers(), schedule, 2, r, dp_size, prefetch) for r in range(dp_size)]
    seen, order, sizes = 0, [], []
    for _ in range(14):
        batches = [loader.load(seen) for loader in loaders]
        sizes.append(schedule.at(seen))
        assert all(len(b) == sizes[-1] // (2 * dp_size) for b in batches)
        order += [int(i) for rank in batches for b in rank for i in b["sample_ids"]]
        seen += sizes[-1]
    assert order == list(range(seen))
    assert sizes == [4] * 5 + [8] * 3 + [12] * 2 + [16] * 4
    for loader in loaders:
        loader.close()
