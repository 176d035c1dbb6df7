"""Fill-in-the-middle: some documents of a sample are rearranged so that their middle comes last.

    PSM   <prefix> A <suffix> C <middle> B        from the text A B C (arXiv:2207.14255)
    SPM   <prefix> <suffix> C <middle> A B

Both cuts are uniform over the tokens. A rearranged piece gives up its last three tokens to the
special ones, so that nothing else in the sample moves: borders, masks and packing are as without.
The end-of-document token stays last. What happens to a piece is a hash of (key, its number).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.data.permutation import derive_key

SPECIAL = 3
_WHETHER, _ORDER, _FIRST, _SECOND = range(4)  # what a key is for
PURPOSE = 3  # of a sample's key among a dataset's; 1 is the order of samples, 2 the windows' offset


@dataclass(frozen=True)
class FillInMiddle:
    """How pieces of documents are rearranged.

    Attributes:
        rate: probability that a piece is. spm_rate: that it then has the suffix first.
        prefix_id, suffix_id, middle_id: special tokens. eod_id: ends a document.
    """

    rate: float
    spm_rate: float
    prefix_id: int
    suffix_id: int
    middle_id: int
    eod_id: int

    def sample_keys(self, dataset_key: int, indices: np.ndarray) -> list[int]:
        """The keys of samples by their number."""
        return [derive_key(dataset_key, PURPOSE, index) for index in indices.tolist()]

    def apply(self, row: np.ndarray, borders: Sequence[int], key: int) -> None:
        """Rearrange the pieces of one sample, in place.

        Args:
            row: (T + 1,) tokens.
            borders: ascending places, the begin of each piece and the end of the last.
            key: of the sample, 64 bits.
        """
        for number, (begin, end) in enumerate(itertools.pairwise(borders)):
            piece = row[begin : end - int(row[end - 1] == self.eod_id)]
            piece_key = derive_key(key, number)
            if len(piece) > SPECIAL and _unit(piece_key, _WHETHER) < self.rate:
                piece[:] = self._rearranged(piece[:-SPECIAL], piece_key)

    def _rearranged(self, text: np.ndarray, key: int) -> np.ndarray:
        places = len(text) + 1
        first, second = sorted(derive_key(key, what) % places for what in (_FIRST, _SECOND))
        before, middle, after = text[:first], text[first:second], text[second:]
        if _unit(key, _ORDER) < self.spm_rate:
            head = [[self.prefix_id, self.suffix_id], after, [self.middle_id], before]
        else:
            head = [[self.prefix_id], before, [self.suffix_id], after, [self.middle_id]]
        return np.concatenate([*head, middle])


def _unit(key: int, what: int) -> float:
    """A number in [0, 1)."""
    return (derive_key(key, what) >> 11) * 2.0**-53
