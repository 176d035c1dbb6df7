"""Samples of whole documents, or of pieces of them, padded to one length (megascale.data.packing).

    tokens of a sample   a a a a E b b E . .      two documents, their E, two places of padding
    inputs               a a a a E b b E .
    labels               a a a E b b E - -        - is no target; with isolated documents the label
                                                  E -> b is none either

Padding is token 0, comes last and is a document of its own: under a causal mask no real token sees
it, and it is never a target. The mean of a step is over targets, so padding weighs nothing in it.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from megascale.data.corpus import TokenCorpus
from megascale.data.epochs import ShuffledEpochs
from megascale.data.fill_in_middle import FillInMiddle
from megascale.data.packing import Packing, PackingReport, Packs
from megascale.data.permutation import derive_key
from megascale.data.protocol import IGNORE_LABEL


class _Samples:
    """Samples by their number in the packing; what both datasets share."""

    def __init__(
        self,
        corpus: TokenCorpus,
        token_range: tuple[int, int],
        seq_length: int,
        packing: Packing,
        isolate_documents: bool,
    ) -> None:
        self._corpus, self._token_range = corpus, token_range
        self._seq_length, self._packing = seq_length, packing
        self._isolate_documents = isolate_documents

    @functools.cached_property
    def packs(self) -> Packs:
        """What is in each sample, found when it is first asked for."""
        return Packs(self._corpus, self._token_range, self._seq_length, self._packing)

    def build(
        self, numbers: np.ndarray, middle: FillInMiddle | None, keys: list[int]
    ) -> dict[str, np.ndarray]:
        """Samples as (B, T) int64; see `PackedDataset.batch`."""
        length = self._seq_length
        windows = np.zeros((len(numbers), length + 1), dtype=np.int64)
        documents = np.zeros((len(numbers), length), dtype=np.int64)
        positions = np.tile(np.arange(length, dtype=np.int64), (len(numbers), 1))
        cuts = []
        for row, number in enumerate(numbers.tolist()):
            borders = [0]
            for start, size in self.packs.spans(number):
                self._corpus.read_into(start, windows[row, borders[-1] : borders[-1] + size])
                borders.append(borders[-1] + size)
            cuts.append(borders)
            if middle is not None:
                middle.apply(windows[row], borders, keys[row])
        batch = {"input_ids": windows[:, :-1], "labels": windows[:, 1:].copy()}
        for row, borders in enumerate(cuts):
            batch["labels"][row, borders[-1] - 1 :] = IGNORE_LABEL
            if self._isolate_documents:
                batch["labels"][row, [end - 1 for end in borders[1:-1]]] = IGNORE_LABEL
                for number, (begin, end) in enumerate(itertools.pairwise([*borders, length])):
                    documents[row, begin:end] = number
                    positions[row, begin:end] = np.arange(min(end, length) - begin)
        if self._isolate_documents:
            batch["document_ids"], batch["position_ids"] = documents, positions
        return batch


class PackedDataset:
    """An endless, shuffled sequence of packed samples over one part of a corpus.

    Sample i is a pure function of (corpus.fingerprint, token_range, seed, i). In each epoch every
    sample of the packing comes once, in an order of its own.

    Args:
        corpus, token_range, seq_length, seed, isolate_documents: as for `GPTDataset`.
        packing: how documents become samples.
        middle: how pieces of documents are rearranged; None: not at all.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        token_range: tuple[int, int],
        seq_length: int,
        seed: int,
        packing: Packing,
        isolate_documents: bool = False,
        middle: FillInMiddle | None = None,
    ) -> None:
        self._samples = _Samples(corpus, token_range, seq_length, packing, isolate_documents)
        self.seq_length, self._middle = seq_length, middle
        self._key = derive_key(int(corpus.fingerprint, 16), seed)

    @functools.cached_property
    def _epochs(self) -> ShuffledEpochs:
        return ShuffledEpochs(len(self._samples.packs), self._key)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the packing."""
        return self._epochs.size

    @property
    def report(self) -> PackingReport:
        """What packing did."""
        return self._samples.packs.report

    def count_tokens(self, first: int, count: int) -> int:
        """Inputs of the samples [first, first + count) that hold a token."""
        return self._epochs.range_sum(self._samples.packs.lengths, first, count)

    def spans(self, index: int) -> list[tuple[int, int]]:
        """(start, length) in the corpus's token stream of each piece of a sample, in order."""
        _, (number,) = self._epochs.locate(np.array([index]))
        return self._samples.packs.spans(int(number))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number: `input_ids` and `labels`, (B, T) int64, labels -100 where nothing is
        predicted, and, if documents are isolated, `document_ids` and `position_ids`."""
        indices = np.asarray(indices, dtype=np.int64)
        keys = self._middle.sample_keys(self._key, indices) if self._middle else []
        return self._samples.build(self._epochs.locate(indices)[1], self._middle, keys)


class PackedEvaluationDataset:
    """Every packed sample of one part of a corpus, once, in order; nothing is rearranged.

    Args:
        corpus, token_range, seq_length, packing, isolate_documents: as for `PackedDataset`.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        token_range: tuple[int, int],
        seq_length: int,
        packing: Packing,
        isolate_documents: bool = False,
    ) -> None:
        self._samples = _Samples(corpus, token_range, seq_length, packing, isolate_documents)
        self.seq_length = seq_length

    def __len__(self) -> int:
        return len(self._samples.packs)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number in [0, len), as from `PackedDataset.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < len(self))
        return self._samples.build(indices, None, [])
