"""Which documents and lines are duplicates of earlier ones, over all shards together.

Documents are numbered through all shards. Of every group the first one stays. Memory: 9 bytes a
document and one bit a line for the result, and hashes in parts of at most `memory_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.minhash import estimate_jaccard
from data_prep.dedup.signatures import DedupOptions, Signatures

KEPT, EXACT, NEAR = 0, 1, 2
_BYTES_A_HASH = 80  # hashes, their numbers, the order and the sorted copies
_PAIRS_AT_ONCE = 1 << 14


@dataclass
class Duplicates:
    """The duplicates among N documents.

    Attributes:
        fates: (N,) uint8, `KEPT`, `EXACT` or `NEAR`.
        lines: per shard (L,) bool over its `line_hashes`, whether a line goes.
        compared: pairs whose signatures were compared.
        near_pairs: those that were alike.
    """

    fates: np.ndarray
    lines: list[np.ndarray]
    compared: int = 0
    near_pairs: int = 0


def find_duplicates(
    shards: Sequence[Signatures], options: DedupOptions, memory_bytes: int = 1 << 30
) -> Duplicates:
    """Search for all that the options ask for; the same for any partition into shards."""
    starts = np.concatenate(([0], np.cumsum([len(shard) for shard in shards]))).astype(np.int64)
    fates = np.zeros(int(starts[-1]), dtype=np.uint8)
    found = Duplicates(fates, [np.zeros(len(shard.line_hashes), dtype=bool) for shard in shards])
    if options.exact:
        columns = [shard.hashes for shard in shards]
        for numbers in _repeated(columns, starts, memory_bytes, None):
            fates[numbers] = EXACT
    if options.near:
        _find_near(shards, starts, options, found, memory_bytes)
    if options.lines:
        _find_lines(shards, starts, found, memory_bytes)
    return found


def _repeated(
    columns: Sequence[np.ndarray],
    starts: np.ndarray,
    memory_bytes: int,
    included: Callable[[int], np.ndarray] | None,
) -> Iterator[np.ndarray]:
    """Numbers of the rows of (n, 2) hashes that an earlier row equals.

    The hashes are taken in parts by their value, so that a part holds all copies of one.

    Args:
        columns: the hashes of each shard.
        starts: number of the first row of each.
        included: (n,) bool of a shard, which of its rows count; None: all.
    """
    parts = max(1, math.ceil(int(starts[-1]) * _BYTES_A_HASH / memory_bytes))
    for part in range(parts):
        hashes, numbers = [], []
        for shard, column in enumerate(columns):
            chosen = np.ones(len(column), dtype=bool) if included is None else included(shard)
            if parts > 1:
                chosen = chosen & (column[:, 0] % np.uint64(parts) == part)
            rows = np.flatnonzero(chosen)
            hashes.append(column[rows])
            numbers.append(rows + starts[shard])
        values, order = np.concatenate(hashes), np.concatenate(numbers)
        # lexsort is stable: equal hashes stay in the order of their numbers
        ranks = np.lexsort((values[:, 1], values[:, 0]))
        values, order = values[ranks], order[ranks]
        yield order[1:][(values[1:] == values[:-1]).all(axis=1)]


def _find_near(
    shards: Sequence[Signatures],
    starts: np.ndarray,
    options: DedupOptions,
    found: Duplicates,
    memory_bytes: int,
) -> None:
    assert options.near is not None
    groups = _Groups(shards, starts, options.near.threshold)
    parts = max(1, math.ceil(len(found.fates) * _BYTES_A_HASH / memory_bytes))
    for band in range(options.near.bands.count):
        for part in range(parts):
            groups.join_equal(*_keys_of_band(shards, starts, found.fates, band, part, parts))
    everything = np.arange(len(found.fates))
    found.fates[(groups.roots(everything) != everything) & (found.fates == KEPT)] = NEAR
    found.compared, found.near_pairs = groups.compared, groups.alike


def _keys_of_band(
    shards: Sequence[Signatures],
    starts: np.ndarray,
    fates: np.ndarray,
    band: int,
    part: int,
    parts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and numbers of the documents that are in question, in the order of the documents."""
    keys, numbers = [], []
    for shard, signatures in enumerate(shards):
        column = signatures.keys[band]
        in_question = (column != 0) & (fates[starts[shard] : starts[shard + 1]] == KEPT)
        if parts > 1:
            in_question &= (column >> np.uint64(1)) % np.uint64(parts) == part
        rows = np.flatnonzero(in_question)
        keys.append(column[rows])
        numbers.append(rows + starts[shard])
    return np.concatenate(keys), np.concatenate(numbers)


class _Groups:
    """Groups of documents that are alike; the root of a group is its first document.

    Attributes:
        compared, alike: pairs of signatures that were compared, and that were alike.
    """

    def __init__(self, shards: Sequence[Signatures], starts: np.ndarray, threshold: float) -> None:
        self._shards, self._starts, self._threshold = shards, starts, threshold
        self._parents = np.arange(int(starts[-1]), dtype=np.int64)
        self.compared = self.alike = 0

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """(m,) the root of each document's group."""
        found = self._parents[numbers]
        while not np.array_equal(above := self._parents[found], found):
            found = above
        self._parents[numbers] = found
        return found

    def join_equal(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Join what has equal keys and is alike.

        In each group of equal keys all others are compared with the first, then those that are
        not like it among themselves, until nothing is left.

        Args:
            keys: (m,) of one band.
            numbers: (m,) ascending.
        """
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        while len(keys) > 1:
            begins = np.concatenate(([True], keys[1:] != keys[:-1]))
            firsts = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
            others = np.flatnonzero(~begins)
            unlike = []
            for begin in range(0, len(others), _PAIRS_AT_ONCE):
                second = others[begin : begin + _PAIRS_AT_ONCE]
                joined = self._join_alike(numbers[firsts[second]], numbers[second])
                unlike.append(second[~joined])
            left = np.concatenate(unlike) if unlike else others
            keys, numbers = keys[left], numbers[left]

    def _join_alike(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(m,) whether the two are in one group, or alike and so now in one."""
        joined = self.roots(first) == self.roots(second)
        apart = np.flatnonzero(~joined)
        jaccard = estimate_jaccard(self._signatures(first[apart]), self._signatures(second[apart]))
        self.compared += len(apart)
        alike = apart[jaccard >= self._threshold]
        self.alike += len(alike)
        for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
            self._unite(one, other)
        joined[alike] = True
        return joined

    def _unite(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        self._parents[max(one, other)] = min(one, other)

    def _root(self, number: int) -> int:
        while (above := int(self._parents[number])) != number:
            number = above
        return number

    def _signatures(self, numbers: np.ndarray) -> np.ndarray:
        """(m, bins) of documents anywhere."""
        bins = self._shards[0].minhash.shape[1]
        result = np.empty((len(numbers), bins), dtype=np.uint16)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(owners).tolist():
            own = np.flatnonzero(owners == shard)
            result[own] = self._shards[shard].minhash[numbers[own] - self._starts[shard]]
        return result


def _find_lines(
    shards: Sequence[Signatures], starts: np.ndarray, found: Duplicates, memory_bytes: int
) -> None:
    """Lines that occurred before; lines of documents that go themselves are not looked at."""
    counts = [len(shard.line_hashes) for shard in shards]
    line_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    def included(shard: int) -> np.ndarray:
        fates = found.fates[starts[shard] : starts[shard + 1]]
        return np.repeat(fates == KEPT, shards[shard].line_counts)

    columns = [shard.line_hashes for shard in shards]
    for numbers in _repeated(columns, line_starts, memory_bytes, included):
        owners = np.searchsorted(line_starts, numbers, side="right") - 1
        for shard in np.unique(owners).tolist():
            found.lines[shard][numbers[owners == shard] - line_starts[shard]] = True
