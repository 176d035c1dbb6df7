"""Sentences as samples for a BERT: [CLS] A [SEP] B [SEP], masked, with or without a sentence task.

A sample is a run of consecutive sentences of one document (`sentence_runs`). With a sentence
objective the run is split in two at a sentence boundary that a hash chooses:

    nsp   B is what follows A (label 0) or, with probability 1/2, text of a random other document
          (label 1): next sentence prediction, arXiv:1810.04805.
    sop   B follows A (label 0) or, with probability 1/2, both are swapped (label 1): sentence
          order prediction, arXiv:1909.11942.
    none  [CLS] run [SEP]: masked tokens only, as in arXiv:1907.11692.

Everything random about sample i is a hash of (fingerprint, seed, i). The runs are the same in
every epoch; their order, split, labels, other documents and masks are not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megascale.data.bert_masking import MaskedVocabulary, Masking, mask_tokens
from megascale.data.corpus import TokenCorpus
from megascale.data.permutation import derive_key, permute
from megascale.data.protocol import IGNORE_LABEL
from megascale.data.sentence_runs import run_starts
from megascale.errors import UserError

SentenceObjective = Literal["none", "nsp", "sop"]

# What a key is for.
_ORDER, _SAMPLE, _EVALUATION = 1, 2, 3
_SPLIT, _LABEL, _DOCUMENT, _RUN, _SENTENCE, _MASKS = range(6)


@dataclass(frozen=True)
class SampleForm:
    """What a sample looks like, whatever text it is made of.

    Attributes:
        seq_length: T, tokens of a sample, special ones and padding included.
        vocabulary: special tokens and word boundaries.
        masking: what is masked.
        objective: the sentence objective.
    """

    seq_length: int
    vocabulary: MaskedVocabulary
    masking: Masking
    objective: SentenceObjective

    @property
    def capacity(self) -> int:
        """Tokens of text that a sample holds."""
        return self.seq_length - (2 if self.objective == "none" else 3)


class _SampleBuilder:
    """Samples out of the runs of one part of a corpus; what both datasets share.

    Args:
        corpus: a sequence of it is a sentence.
        token_range: (start, stop) of the part, from `TokenCorpus.split`.
        form: of the samples.

    Raises:
        UserError: seq_length leaves no room for text, the part is empty, or nsp has only one
            document to take other text from.
    """

    def __init__(self, corpus: TokenCorpus, token_range: tuple[int, int], form: SampleForm) -> None:
        self.corpus, self.token_range, self.form = corpus, token_range, form
        self.vocabulary, self.objective = form.vocabulary, form.objective
        self.capacity = form.capacity
        self._check()

    @functools.cached_property
    def runs(self) -> np.ndarray:
        """(runs + 1,) int64 token positions, built when the first sample is asked for."""
        return run_starts(self.corpus, self.token_range, self.capacity)

    @functools.cached_property
    def _document_runs(self) -> np.ndarray:
        """(documents + 1,) int64: the first run of each document that is not empty, and the end."""
        start, stop = self.token_range
        documents = np.unique(np.append(start, self.corpus.boundaries(start, stop - start)))
        return np.searchsorted(self.runs, np.append(documents, stop))

    def build(self, runs: np.ndarray, keys: list[int]) -> dict[str, np.ndarray]:
        """Samples over the given runs, each with a key of its own; see `BERTDataset.batch`."""
        shape = (len(runs), self.form.seq_length)
        input_ids = np.full(shape, self.vocabulary.pad_id, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        token_types = np.zeros(shape, dtype=np.int64)
        attention = np.zeros(shape, dtype=np.int64)
        sentence_labels = np.empty(len(runs), dtype=np.int64)
        for row, (run, key) in enumerate(zip(runs.tolist(), keys, strict=True)):
            parts, sentence_labels[row] = self._parts(run, key)
            input_ids[row, 0] = self.vocabulary.cls_id
            place = 1
            for number, tokens in enumerate(parts):
                end = place + len(tokens)
                input_ids[row, place:end] = tokens
                input_ids[row, end] = self.vocabulary.sep_id
                segments[row, place:end] = number
                token_types[row, place : end + 1] = number
                place = end + 1
            attention[row, :place] = 1
        mask_keys = np.array([derive_key(key, _MASKS) for key in keys], dtype=np.uint64)
        input_ids, labels = mask_tokens(
            input_ids, segments, mask_keys, self.vocabulary, self.form.masking
        )
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "token_type_ids": token_types,
            "attention_mask": attention,
        }
        if self.objective != "none":
            batch["sentence_labels"] = sentence_labels
        return batch

    def _parts(self, run: int, key: int) -> tuple[list[np.ndarray], int]:
        """The one or two segments of a sample and its sentence label.

        A run of a single token cannot be split: it stays one segment, without a sentence label.
        """
        start, stop = int(self.runs[run]), int(self.runs[run + 1])
        tokens = self.corpus.read(start, stop - start)
        if self.objective == "none" or len(tokens) < 2:
            return [tokens], IGNORE_LABEL
        cuts = self._cuts(start, tokens)
        cut = int(cuts[derive_key(key, _SPLIT) % len(cuts)])
        first, second = tokens[:cut], tokens[cut:]
        label = derive_key(key, _LABEL) & 1
        if not label:
            return [first, second], 0
        if self.objective == "sop":
            return [second, first], 1
        return [first, self._other_text(run, key, len(second), self.capacity - cut)], 1

    def _cuts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Where a run may be split: at a sentence, else at a word, else anywhere; never empty."""
        sentences = self.corpus.sequence_starts(start + 1, start + len(tokens)) - start
        if sentences.size:
            return sentences
        words = np.flatnonzero(self.vocabulary.word_starts[tokens[1:]]) + 1
        return words if words.size else np.arange(1, len(tokens))

    def _other_text(self, run: int, key: int, wanted: int, room: int) -> np.ndarray:
        """Whole sentences of another document, about `wanted` tokens and at most `room`.

        As long as the text that they replace: the length alone must not tell the label.
        """
        firsts = self._document_runs
        count = len(firsts) - 1
        own = int(np.searchsorted(firsts, run, side="right")) - 1
        other = (own + 1 + derive_key(key, _DOCUMENT) % (count - 1)) % count
        low, high = int(firsts[other]), int(firsts[other + 1])
        chosen = low + derive_key(key, _RUN) % (high - low)
        start, stop = int(self.runs[chosen]), int(self.runs[chosen + 1])
        # Sentences end where others begin; a run may begin inside a long sentence.
        begins = np.append(start, self.corpus.sequence_starts(start + 1, stop))
        first = derive_key(key, _SENTENCE) % len(begins)
        ends = np.append(begins[first + 1 :], stop) - begins[first]
        last = min(int(np.searchsorted(ends, wanted)), len(ends) - 1)
        if ends[last] > room and last > 0:
            last -= 1
        return self.corpus.read(int(begins[first]), min(int(ends[last]), room))

    def _check(self) -> None:
        start, stop = self.token_range
        assert 0 <= start <= stop <= self.corpus.num_tokens
        least = 1 if self.objective == "none" else 2
        if self.capacity < least:
            special = self.form.seq_length - self.capacity
            raise UserError(
                f"seq_length {self.form.seq_length}",
                rule=f"a sample holds {special} special tokens and at least {least} of text",
                remedy=f"model.seq_length >= {special + least}",
            )
        where = f"tokens {start}..{stop} of {self.corpus.path}"
        if start == stop:
            raise UserError(
                f"{where} are none",
                rule="a part of the split holds at least one sentence",
                remedy="give this part of the split a larger fraction, or prepare more text",
            )
        documents = np.unique(np.append(start, self.corpus.boundaries(start, stop - start)))
        if self.objective == "nsp" and len(documents) < 2:
            raise UserError(
                f"{where} are one document",
                rule="with data.sentence_objective=nsp half of the second segments come from "
                "another document, in each part of the split",
                remedy="prepare more documents (`--documents paragraph` cuts text files), give "
                "this part a larger fraction, or use data.sentence_objective=sop",
            )


class BERTDataset:
    """An endless, shuffled sequence of masked samples over one part of a corpus of sentences.

    Sample i is a pure function of (corpus.fingerprint, token_range, seed, i). Epochs follow each
    other without end; in each, every run comes once, in an order of its own.

    Args:
        corpus, token_range, form: see `_SampleBuilder`.
        seed: any integer.
    """

    def __init__(
        self, corpus: TokenCorpus, token_range: tuple[int, int], form: SampleForm, seed: int
    ) -> None:
        self._builder = _SampleBuilder(corpus, token_range, form)
        self.seq_length = form.seq_length
        self._key = derive_key(int(corpus.fingerprint, 16), seed)

    @property
    def samples_per_epoch(self) -> int:
        """Runs of the part; the first call reads the index of the part."""
        return len(self._builder.runs) - 1

    def count_tokens(self, first: int, count: int) -> int:
        """Tokens of `count` samples; here padding counts."""
        return count * self.seq_length

    def spans(self, index: int) -> list[tuple[int, int]]:
        """The run of a sample; half of it is not shown where nsp puts other text in its place."""
        run = int(self.run_of(np.array([index]))[0])
        start, stop = self._builder.runs[run : run + 2].tolist()
        return [(start, stop - start)]

    def run_of(self, indices: np.ndarray) -> np.ndarray:
        """Which run each sample is made of: int64, the shape of `indices`."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or indices.min() >= 0, "sample numbers begin at 0"
        epochs, ranks = np.divmod(indices, self.samples_per_epoch)
        runs = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = derive_key(self._key, _ORDER, epoch)
            runs[chosen] = permute(ranks[chosen], self.samples_per_epoch, key)
        return runs

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number, int64:

        `input_ids`, `token_type_ids`, `attention_mask` (1, and 0 at padding) and `labels` (-100
        where nothing is predicted), each (B, T); with a sentence objective `sentence_labels` (B,).
        """
        keys = [derive_key(self._key, _SAMPLE, index) for index in np.asarray(indices).tolist()]
        return self._builder.build(self.run_of(indices), keys)


class BERTEvaluationDataset:
    """Every run of one part of a corpus, once, in order; masked and paired always alike.

    Args:
        corpus, token_range, form: see `_SampleBuilder`.
    """

    def __init__(self, corpus: TokenCorpus, token_range: tuple[int, int], form: SampleForm) -> None:
        self._builder = _SampleBuilder(corpus, token_range, form)
        self.seq_length = form.seq_length
        # No seed: runs with different seeds are measured on the same task.
        self._key = derive_key(int(corpus.fingerprint, 16), _EVALUATION)

    def __len__(self) -> int:
        return len(self._builder.runs) - 1

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number in [0, len), as from `BERTDataset.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < len(self))
        keys = [derive_key(self._key, index) for index in indices.tolist()]
        return self._builder.build(indices, keys)
