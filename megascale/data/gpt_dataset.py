"""Windows of a token stream as samples for next-token prediction.

Documents stay in file order. A window is seq_length + 1 tokens, of which the last is the first of
the next window, so each token but the first is a target once:

    tokens  t0 t1 t2 t3 t4 t5 t6 t7 t8     seq_length 4
    window 0  [t0 t1 t2 t3 t4]             inputs t0..t3, labels t1..t4
    window 1              [t4 t5 t6 t7 t8] inputs t4..t7, labels t5..t8

No index is built: sample -> (epoch, rank in the epoch) -> permuted window -> position is
arithmetic, so opening costs nothing and a longer run begins with the same samples.
"""

from __future__ import annotations

import numpy as np

from megascale.data.corpus import TokenCorpus
from megascale.data.epochs import ShuffledEpochs
from megascale.data.fill_in_middle import FillInMiddle
from megascale.data.permutation import derive_key
from megascale.data.protocol import IGNORE_LABEL
from megascale.errors import UserError

_OFFSET = 2  # what a key is for


class GPTDataset:
    """An endless, shuffled sequence of windows over one part of a corpus.

    Sample i is a pure function of (corpus.fingerprint, token_range, seed, i). Epochs follow each
    other without end, each with its own order and its own offset of the first window, so that the
    tail that fits no whole window is seen in other epochs.

    Args:
        corpus: where the tokens are.
        token_range: (start, stop) of the part, from `TokenCorpus.split`.
        seq_length: T, inputs a sample.
        seed: any integer.
        isolate_documents: add `document_ids` and `position_ids`, and mask the labels that would
            predict the next document's first token.
        middle: how pieces of documents are rearranged; None: not at all.

    Raises:
        UserError: the part is shorter than one window.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        token_range: tuple[int, int],
        seq_length: int,
        seed: int,
        isolate_documents: bool = False,
        middle: FillInMiddle | None = None,
    ) -> None:
        _check_range(corpus, token_range, minimum=seq_length + 1, seq_length=seq_length)
        self.corpus, self.token_range, self.seq_length = corpus, token_range, seq_length
        self.isolate_documents, self._middle = isolate_documents, middle
        targets = token_range[1] - token_range[0] - 1
        self.samples_per_epoch = targets // seq_length
        self._slack = targets - self.samples_per_epoch * seq_length
        self._key = derive_key(int(corpus.fingerprint, 16), seed)
        self._epochs = ShuffledEpochs(self.samples_per_epoch, self._key)

    def epoch_of(self, index: int) -> int:
        """The epoch, from 0, in which a sample lies."""
        return index // self.samples_per_epoch

    def window(self, index: int) -> tuple[int, int]:
        """(start, length) of a sample in the corpus's token stream; length is seq_length + 1."""
        return int(self._starts(np.array([index]))[0]), self.seq_length + 1

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number: `input_ids` and `labels`, (B, T) int64, and, if documents are
        isolated, `document_ids` (0, 1, ... within the window) and `position_ids` (from 0 at each
        document's start and at the window's)."""
        indices = np.asarray(indices, dtype=np.int64)
        starts = self._starts(indices)
        windows = self.corpus.read_windows(starts, self.seq_length + 1)
        if self._middle is not None:
            keys = self._middle.sample_keys(self._key, indices)
            for row, start, key in zip(windows, starts.tolist(), keys, strict=True):
                inside = np.unique(self.corpus.boundaries(start + 1, self.seq_length)) - start
                self._middle.apply(row, [0, *inside.tolist(), len(row)], key)
        return _to_batch(self.corpus, starts, windows, self.isolate_documents)

    def count_tokens(self, first: int, count: int) -> int:
        """Tokens of `count` samples: windows are always full."""
        return count * self.seq_length

    def spans(self, index: int) -> list[tuple[int, int]]:
        """The one window of a sample."""
        return [self.window(index)]

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        epochs, windows = self._epochs.locate(indices)
        starts = self.token_range[0] + windows * self.seq_length
        if self._slack:
            for epoch in set(epochs.tolist()):
                offset = derive_key(self._key, _OFFSET, epoch) % (self._slack + 1)
                starts[epochs == epoch] += offset
        return starts


class EvaluationDataset:
    """Every window of one part of a corpus, once, in order; each token but the first is a target.

    The last window may be partial: it is padded with token 0 and label -100, and with documents
    isolated the padding is a document of its own.

    Args:
        corpus, token_range, seq_length, isolate_documents: as for `GPTDataset`.

    Raises:
        UserError: the part holds fewer than two tokens.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        token_range: tuple[int, int],
        seq_length: int,
        isolate_documents: bool = False,
    ) -> None:
        _check_range(corpus, token_range, minimum=2, seq_length=seq_length)
        self.corpus, self.token_range, self.seq_length = corpus, token_range, seq_length
        self.isolate_documents = isolate_documents

    def __len__(self) -> int:
        targets = self.token_range[1] - self.token_range[0] - 1
        return -(-targets // self.seq_length)

    def window(self, index: int) -> tuple[int, int]:
        """(start, length) of a sample in the corpus's token stream; the last may be shorter."""
        start = self.token_range[0] + index * self.seq_length
        return start, min(self.seq_length + 1, self.token_range[1] - start)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number in [0, len), as from `GPTDataset.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < len(self))
        windows = np.zeros((len(indices), self.seq_length + 1), dtype=np.int64)
        starts = np.empty_like(indices)
        lengths = np.empty_like(indices)
        for row, index in enumerate(indices.tolist()):
            starts[row], lengths[row] = self.window(index)
            self.corpus.read_into(int(starts[row]), windows[row, : lengths[row]])
        result = _to_batch(self.corpus, starts, windows, self.isolate_documents)
        result["labels"] = result["labels"].copy()  # else they share memory with the inputs
        self._mask_padding(result, lengths)
        return result

    def _mask_padding(self, result: dict[str, np.ndarray], lengths: np.ndarray) -> None:
        for row in np.flatnonzero(lengths < self.seq_length + 1).tolist():
            length = int(lengths[row])
            result["labels"][row, length - 1 :] = IGNORE_LABEL
            if self.isolate_documents:
                document = result["document_ids"][row, length - 1] + 1
                result["document_ids"][row, length:] = document
                result["position_ids"][row, length:] = np.arange(self.seq_length - length)


def _to_batch(
    corpus: TokenCorpus, starts: np.ndarray, windows: np.ndarray, isolate_documents: bool
) -> dict[str, np.ndarray]:
    batch = {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}
    if isolate_documents:
        batch["labels"] = batch["labels"].copy()
        _isolate_documents(corpus, starts, batch)
    return batch


def _isolate_documents(
    corpus: TokenCorpus, starts: np.ndarray, batch: dict[str, np.ndarray]
) -> None:
    """Add document and position ids from the index, and mask labels across documents, in place."""
    batch_size, seq_length = batch["input_ids"].shape
    document_ids = np.zeros((batch_size, seq_length), dtype=np.int64)
    position_ids = np.tile(np.arange(seq_length, dtype=np.int64), (batch_size, 1))
    for row, start in enumerate(starts.tolist()):
        # The last label is one past the last input: its document matters for the mask.
        begins = np.unique(corpus.boundaries(start + 1, seq_length)) - start  # in 1..T
        batch["labels"][row, begins - 1] = IGNORE_LABEL
        for begin in begins[begins < seq_length].tolist():
            document_ids[row, begin:] += 1
            position_ids[row, begin:] = np.arange(seq_length - begin)
    batch["document_ids"], batch["position_ids"] = document_ids, position_ids


def _check_range(
    corpus: TokenCorpus, token_range: tuple[int, int], minimum: int, seq_length: int
) -> None:
    start, stop = token_range
    assert seq_length >= 1
    assert 0 <= start <= stop <= corpus.num_tokens, f"{token_range} of {corpus.num_tokens} tokens"
    if stop - start < minimum:
        raise UserError(
            f"tokens {start}..{stop} of {corpus.path} are {stop - start} tokens",
            rule=f"with seq_length {seq_length} at least {minimum} are needed",
            remedy="give this part of the split a larger fraction, lower model.seq_length, "
            "or prepare more text",
        )
