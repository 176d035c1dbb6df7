"""The keyed permutation: a bijection for every size and key, and no obvious pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.permutation import MAX_SIZE, derive_key, mix64, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_bijection(size: int, key: int) -> None:
    permuted = permute(np.arange(size), size, key)
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2**31, MAX_SIZE), key=st.integers(0, 2**64 - 1))
def test_huge_sizes_stay_in_range_and_do_not_collide(size: int, key: int) -> None:
    indices = np.append(np.arange(500), size - 1 - np.arange(500))
    permuted = permute(indices, size, key)
    assert permuted.min() >= 0
    assert permuted.max() < size
    assert len(np.unique(permuted)) == 1000


def test_each_index_is_permuted_by_itself() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert np.array_equal(permute(np.array([[3, 999], [0, 3]]), 1000, 7), whole[[[3, 999], [0, 3]]])


def test_order_is_shuffled_and_depends_on_the_key() -> None:
    first, second = (permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    # A random permutation has one fixed point on average, and two agree in one place.
    assert (first == np.arange(10_000)).sum() < 10
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("place", [0, 5, 11])
def test_every_value_appears_at_a_place_equally_often(place: int) -> None:
    seen = [int(permute(np.array([place]), 12, derive_key(key))[0]) for key in range(2400)]
    counts = np.bincount(seen, minlength=12)
    # chi-square with 11 degrees of freedom: 31.3 is exceeded once in a thousand.
    assert ((counts - 200) ** 2 / 200).sum() < 31.3


def test_values_are_pinned() -> None:
    """Sample order is part of a run's identity: a change here breaks every resume."""
    assert mix64(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's first output
    assert permute(np.arange(8), 8, 42).tolist() == [3, 4, 0, 1, 7, 2, 6, 5]


def test_keys_depend_on_every_part_and_on_order() -> None:
    keys = {
        derive_key(*parts) for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (1, 2 + 2**64), (-1, 2)]
    }
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)
