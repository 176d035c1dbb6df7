"""MinHash signatures of texts, and the bands by which alike ones are found.

One-permutation hashing (Li, Owen, Zhang 2012, arXiv:1208.1259): every n-gram of words is hashed
once; the high bits choose one of k bins, the low 32 bits compete for its minimum. Two texts agree
in a bin that either fills with probability J, the Jaccard index of their sets of n-grams. For
bands, where an empty bin must not count as agreement, empty bins borrow from others in an order
that depends on the bin only (optimal densification: Shrivastava 2017, arXiv:1703.04664). To compare
two texts the low 16 bits of each bin are kept (Li, Koenig 2010, arXiv:0910.3349).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.word_hashes import MULTIPLIER, hash_words, mix, ngrams_of_texts

EMPTY = np.uint32(0xFFFFFFFF)
EMPTY_SHORT = np.uint16(0xFFFF)
_CANDIDATE_PROBABILITY = 0.98  # that a pair right at the threshold shares a band
_BORROWINGS = 256


@dataclass(frozen=True)
class Bands:
    """`count` bands of `rows` bins: two texts that agree in all rows of a band are compared."""

    count: int
    rows: int

    def probability(self, jaccard: float) -> float:
        """That two texts of this Jaccard index are compared."""
        return 1 - (1 - jaccard**self.rows) ** self.count


def choose_bands(threshold: float, bins: int) -> Bands:
    """The most rows with which a pair at the threshold is compared with probability 0.98.

    More rows mean fewer pairs that are compared in vain; none is taken for a duplicate unseen.
    """
    fitting = [Bands(bins // rows, rows) for rows in range(1, bins + 1)]
    good = [bands for bands in fitting if bands.probability(threshold) >= _CANDIDATE_PROBABILITY]
    return good[-1] if good else fitting[0]


def make_signatures(texts: Sequence[bytes], ngram: int, bins: int) -> np.ndarray:
    """(n, bins) uint32 of UTF-8 texts; `EMPTY` in bins that no n-gram fell into.

    Args:
        texts: together at most some hundred kilobytes, to stay in the processor's caches.
        ngram: words in an n-gram; a shorter text has one, of all its words.
        bins: a power of two.
    """
    assert bins & (bins - 1) == 0
    hashes, owners = ngrams_of_texts(hash_words(texts), ngram)
    found = np.full(len(texts) * bins, EMPTY, dtype=np.uint32)
    shift = np.uint64(64 - (bins.bit_length() - 1))
    places = owners * bins + (hashes >> shift).astype(np.int64)
    np.minimum.at(found, places, np.minimum(hashes.astype(np.uint32), EMPTY - np.uint32(1)))
    return found.reshape(len(texts), bins)


def band_keys(signatures: np.ndarray, bands: Bands) -> np.ndarray:
    """(n, bands) uint64 keys: equal where all rows of a band agree; 0 for texts without words."""
    filled = _densified(signatures, bands.count * bands.rows)
    used = filled.reshape(len(filled), bands.count, bands.rows)
    keys = np.zeros((len(filled), bands.count), dtype=np.uint64)
    for row in range(bands.rows):
        keys *= MULTIPLIER
        keys += used[:, :, row]
    keys = mix(keys) | np.uint64(1)
    keys[(signatures == EMPTY).all(axis=1)] = 0
    return keys


def shorten(signatures: np.ndarray) -> np.ndarray:
    """(n, bins) uint16, low bits of signatures; `EMPTY_SHORT` in empty bins."""
    short = np.minimum(signatures.astype(np.uint16), EMPTY_SHORT - np.uint16(1))
    short[signatures == EMPTY] = EMPTY_SHORT
    return short


def estimate_jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(m,) estimates for m pairs of shortened signatures; bins empty in both do not count."""
    filled = (first != EMPTY_SHORT) | (second != EMPTY_SHORT)
    agree = (first == second) & filled
    return agree.sum(axis=1) / np.maximum(filled.sum(axis=1), 1)


def _densified(signatures: np.ndarray, count: int) -> np.ndarray:
    """(n, count), the first bins; empty ones hold the value of another, the same in every text."""
    result = signatures[:, :count].copy()
    rows = np.flatnonzero((result == EMPTY).any(axis=1) & (signatures != EMPTY).any(axis=1))
    bins = signatures.shape[1]
    draws = mix(np.arange(1, _BORROWINGS * bins + 1, dtype=np.uint64)) % np.uint64(bins)
    lenders = draws.astype(np.int64).reshape(_BORROWINGS, bins)[:, :count]
    for lender in lenders:
        if not rows.size:
            break
        own, offered = result[rows], signatures[rows][:, lender]
        result[rows] = np.where(own == EMPTY, offered, own)
        rows = rows[(result[rows] == EMPTY).any(axis=1)]
    if rows.size:  # texts of a handful of n-grams: each bin takes the next filled one
        filled = signatures[rows] != EMPTY
        places = np.where(np.tile(filled, 2), np.arange(2 * bins), 2 * bins)
        following = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1][:, :count] % bins
        borrowed = np.take_along_axis(signatures[rows], following, axis=1)
        result[rows] = np.where(result[rows] == EMPTY, borrowed, result[rows])
    return result
