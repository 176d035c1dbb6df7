"""Epoch after epoch over a finite set, each in an order of its own, by arithmetic."""

from __future__ import annotations

import functools

import numpy as np

from megascale.data.permutation import derive_key, permute

_ORDER = 1  # what a key is for
_BLOCK = 4096  # samples at most; a permutation of a few costs almost as much as one of so many
_LEAST_BLOCK = 64  # of a small set: each epoch in a block is a permutation of its own


class ShuffledEpochs:
    """Sample number -> (epoch, place in the set), a pure function of (size, key, number).

    Args:
        size: places of the set, at least 1.
        key: 64 bits.
    """

    def __init__(self, size: int, key: int) -> None:
        assert size >= 1
        self.size, self._key = size, key
        self._length = min(_BLOCK, max(_LEAST_BLOCK, size))
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, places), int64 of the shape (B,) of the sample numbers `indices`."""
        if not indices.size:
            return indices, indices
        low, high = int(indices.min()), int(indices.max())
        assert low >= 0, "sample numbers begin at 0"
        first, last = low // self._length, high // self._length
        if first == last:
            epochs, places = self._block(first)
            local = indices - first * self._length
            return epochs[local], places[local]
        if last == first + 1:
            pairs = zip(self._block(first), self._block(last), strict=True)
            epochs, places = (np.concatenate(pair) for pair in pairs)
            local = indices - first * self._length
            return epochs[local], places[local]
        return self._compute(indices)

    def range_sum(self, values: np.ndarray, first: int, count: int) -> int:
        """The sum of `values` (size,) over the places of samples [first, first + count)."""
        total, stop = 0, first + count
        while first < stop:
            epoch, rank = divmod(first, self.size)
            if rank == 0 and stop - first >= self.size:
                epochs = (stop - first) // self.size
                total += epochs * int(values.sum(dtype=np.int64))
                first += epochs * self.size
                continue
            length = min(self.size - rank, stop - first, 1 << 20)
            ranks = np.arange(rank, rank + length, dtype=np.int64)
            places = permute(ranks, self.size, derive_key(self._key, _ORDER, epoch))
            total += int(values[places].sum(dtype=np.int64))
            first += length
        return total

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._compute(np.arange(self._length, dtype=np.int64) + number * self._length)

    def _compute(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, ranks = np.divmod(indices, self.size)
        if self.size == 1:  # a loop over epochs would be one over samples
            return epochs, ranks
        places = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            order_key = derive_key(self._key, _ORDER, epoch)
            places[chosen] = permute(ranks[chosen], self.size, order_key)
        return epochs, places
