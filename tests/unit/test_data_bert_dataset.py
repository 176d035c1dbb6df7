"""Runs of sentences, pairs made of them, and what is a function of what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.bert_dataset import (
    BERTDataset,
    BERTEvaluationDataset,
    SampleForm,
    SentenceObjective,
)
from megascale.data.bert_masking import MaskedVocabulary, Masking
from megascale.data.corpus import TokenCorpus
from megascale.data.sentence_runs import run_starts
from megascale.data.token_file import TokenFile, TokenFileWriter
from megascale.errors import UserError

VOCAB = 2000
FIRST = 10  # ids below are special: a token is its position + FIRST
VOCABULARY = MaskedVocabulary(
    cls_id=1,
    sep_id=2,
    mask_id=3,
    pad_id=0,
    word_starts=np.arange(VOCAB) % 2 == 0,
    ordinary_ids=np.arange(4, VOCAB),
)
Documents = Sequence[Sequence[int]]
DOCUMENTS = [[5, 3, 9], [], [1], [4, 0, 40, 2], [7] * 12, [30, 30], [2, 2, 2, 2], [11]]


def _corpus(folder: Path, documents: Documents, name: str = "corpus") -> TokenCorpus:
    """A token is its own position + FIRST; `documents` are lengths of sentences."""
    with TokenFileWriter(folder / name, np.int32) as writer:
        position = FIRST
        for lengths in documents:
            ends = position + np.cumsum([0, *lengths])
            writer.add_document([np.arange(a, b) for a, b in pairwise(ends)])
            position = int(ends[-1])
    return TokenCorpus.open(folder / name)


def _dataset(
    corpus: TokenCorpus,
    objective: SentenceObjective = "none",
    seq_length: int = 24,
    seed: int = 1,
    part: tuple[int, int] | None = None,
    masking: Masking | None = None,
) -> BERTDataset:
    part = part or (0, corpus.num_tokens)
    form = SampleForm(seq_length, VOCABULARY, masking or Masking(), objective)
    return BERTDataset(corpus, part, form, seed)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return _corpus(tmp_path_factory.mktemp("corpus"), DOCUMENTS)


def _segments(batch: dict[str, np.ndarray], row: int) -> list[np.ndarray]:
    """The original tokens of a sample's segments, masks undone, as positions."""
    ids = np.where(batch["labels"][row] >= 0, batch["labels"][row], batch["input_ids"][row])
    real = int(batch["attention_mask"][row].sum())
    assert (batch["attention_mask"][row, :real] == 1).all()
    assert (ids[real:] == VOCABULARY.pad_id).all()
    assert (batch["token_type_ids"][row, real:] == 0).all()
    assert ids[0] == VOCABULARY.cls_id
    ends = np.flatnonzero(ids == VOCABULARY.sep_id)
    assert ends[-1] == real - 1
    begins = [1, *(ends[:-1] + 1).tolist()]
    for number, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
        assert (batch["token_type_ids"][row, begin : end + 1] == number).all()
    return [ids[b:e] - FIRST for b, e in zip(begins, ends.tolist(), strict=True)]


def _greedy(documents: Documents, capacity: int) -> list[int]:
    """The first token of each run, one sentence at a time."""
    starts, position = [], 0
    for lengths in documents:
        room = 0
        for length in lengths:
            pieces = -(-length // capacity)
            size = -(-length // pieces) if pieces else 0
            while length:
                piece = min(size, length)
                if piece > room:
                    starts.append(position)
                    room = capacity
                room -= piece
                position, length = position + piece, length - piece
    return [*starts, position]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=8),
    capacity=st.integers(1, 25),
)
def test_runs_are_those_of_a_greedy_loop(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, capacity: int
) -> None:
    if not sum(map(sum, documents)):
        return
    corpus = _corpus(tmp_path_factory.mktemp("runs"), documents)
    found = run_starts(corpus, (0, corpus.num_tokens), capacity)
    assert found.tolist() == _greedy(documents, capacity)


def test_runs_do_not_depend_on_blocks_and_shards(
    corpus: TokenCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_starts(corpus, (0, corpus.num_tokens), 20).tolist()
    monkeypatch.setattr("megascale.data.sentence_runs._DOCUMENTS_AT_ONCE", 2)
    assert run_starts(corpus, (0, corpus.num_tokens), 20).tolist() == expected
    for name, part in (("a", DOCUMENTS[:4]), ("b", DOCUMENTS[4:])):
        _corpus(tmp_path, part, name)
    shards = [TokenFile(tmp_path / name) for name in ("a", "b")]
    both = TokenCorpus(tmp_path, shards, None)
    assert run_starts(both, (0, both.num_tokens), 20).tolist() == expected
    middle = corpus.document_starts[4], corpus.document_starts[6]
    inner = [start for start in expected if middle[0] <= start <= middle[1]]
    assert run_starts(corpus, (int(middle[0]), int(middle[1])), 20).tolist() == inner


@pytest.mark.parametrize("objective", ["none", "sop"])
def test_an_epoch_shows_each_token_once(corpus: TokenCorpus, objective: SentenceObjective) -> None:
    dataset = _dataset(corpus, objective)
    count = dataset.samples_per_epoch
    orders = []
    for epoch in (0, 1, 7):
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        orders.append(tuple(dataset.run_of(numbers).tolist()))
        batch = dataset.batch(numbers)
        shown = [part for row in range(count) for part in _segments(batch, row)]
        assert np.array_equal(np.sort(np.concatenate(shown)), np.arange(corpus.num_tokens))
        assert all((np.diff(part) == 1).all() for part in shown)
    assert len(set(orders)) == 3


def test_a_sample_is_a_function_of_its_number(corpus: TokenCorpus) -> None:
    whole = _dataset(corpus, "nsp").batch(np.arange(90))
    picked = np.array([77, 3, 3, 50])
    again = _dataset(corpus, "nsp").batch(picked)
    assert set(again) == {
        *("input_ids", "labels", "token_type_ids", "attention_mask", "sentence_labels")
    }
    for name, rows in again.items():
        assert rows.dtype == np.int64
        assert np.array_equal(rows, whole[name][picked]), name
    other = _dataset(corpus, "nsp", seed=2).batch(np.arange(90))
    assert not np.array_equal(other["input_ids"], whole["input_ids"])


def test_masks_and_pairs_differ_between_epochs(corpus: TokenCorpus) -> None:
    dataset = _dataset(corpus, "sop")
    count = dataset.samples_per_epoch
    longest = int(np.argmax(np.diff(run_starts(corpus, (0, corpus.num_tokens), 21))))
    same_run = np.flatnonzero(dataset.run_of(np.arange(12 * count)) == longest)
    assert len(same_run) == 12
    batch = dataset.batch(same_run)
    assert len({tuple(row) for row in batch["labels"].tolist()}) == 12
    assert set(batch["sentence_labels"].tolist()) == {0, 1}


def test_sop_swaps_what_follows(corpus: TokenCorpus) -> None:
    batch = _dataset(corpus, "sop").batch(np.arange(400))
    seen = []
    for row, label in enumerate(batch["sentence_labels"].tolist()):
        parts = _segments(batch, row)
        seen.append(label)
        if label == -100:
            assert [len(part) for part in parts] == [1], "only a single token has no order"
            continue
        first, second = parts if label == 0 else parts[::-1]
        assert second[0] == first[-1] + 1
    labels = np.array(seen)
    assert -100 in seen
    assert 0.4 < labels[labels >= 0].mean() < 0.6


def test_nsp_takes_whole_sentences_of_another_document(corpus: TokenCorpus) -> None:
    dataset = _dataset(corpus, "nsp")
    batch = dataset.batch(np.arange(600))
    documents = np.searchsorted(corpus.document_starts, np.arange(corpus.num_tokens), "right")
    begins = set(corpus.sequence_starts(0, corpus.num_tokens).tolist())
    begins |= set(run_starts(corpus, (0, corpus.num_tokens), 21).tolist())
    labels, sources = batch["sentence_labels"], set()
    for row in np.flatnonzero(labels == 1).tolist():
        first, second = _segments(batch, row)
        assert documents[second[0]] != documents[first[0]]
        assert len(set(documents[second])) == 1
        assert second[0] in begins
        assert second[-1] + 1 in begins or len(first) + len(second) == 21  # cut to fit
        sources.add(int(documents[second[0]]))
    assert sources == set(documents.tolist()), "every document is drawn from"
    for row in np.flatnonzero(labels == 0).tolist():
        first, second = _segments(batch, row)
        assert second[0] == first[-1] + 1
    assert 0.4 < labels[labels >= 0].mean() < 0.6


def test_pairs_are_split_at_sentences_and_else_at_words(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [[4, 5, 6], [18]])
    batch = _dataset(corpus, "sop", seq_length=21).batch(np.arange(120))
    cuts = set()
    for row in range(120):
        first, second = _segments(batch, row)
        cuts.add(max(int(first[0]), int(second[0])))
    words = {position for position in range(16, 33) if (position + FIRST) % 2 == 0}
    assert cuts == {4, 9} | words


@pytest.mark.parametrize("objective", ["none", "nsp", "sop"])
def test_evaluation_is_every_run_once_and_always_the_same(
    corpus: TokenCorpus, objective: SentenceObjective
) -> None:
    part = (0, corpus.num_tokens)
    made = [
        BERTEvaluationDataset(corpus, part, SampleForm(24, VOCABULARY, Masking(), objective))
        for _ in range(2)
    ]
    count = len(made[0])
    assert count == _dataset(corpus, objective).samples_per_epoch
    whole = made[0].batch(np.arange(count))
    reversed_rows = made[1].batch(np.arange(count)[::-1])
    for name, rows in whole.items():
        assert np.array_equal(rows, reversed_rows[name][::-1]), name
    first_tokens = [int(np.concatenate(_segments(whole, row)).min()) for row in range(count)]
    if objective != "nsp":
        assert (
            first_tokens
            == run_starts(corpus, part, 22 if objective == "none" else 21)[:-1].tolist()
        )


def test_what_cannot_be_sampled_is_refused_with_numbers(corpus: TokenCorpus) -> None:
    assert _dataset(corpus, "sop", seq_length=5).samples_per_epoch > 0
    with pytest.raises(UserError, match=r"seq_length 4(.|\n)*>= 5"):
        _dataset(corpus, "sop", seq_length=4)
    with pytest.raises(UserError, match=r"seq_length 2(.|\n)*>= 3"):
        _dataset(corpus, "none", seq_length=2)
    one = (0, int(corpus.document_starts[1]))
    _dataset(corpus, "sop", part=one)
    with pytest.raises(UserError, match="are one document"):
        _dataset(corpus, "nsp", part=one)
    with pytest.raises(UserError, match="are none"):
        _dataset(corpus, part=(5, 5))
