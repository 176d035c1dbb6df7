"""Packing: which tokens are targets, where documents end, and what padding may not do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data import packing as packing_module
from megascale.data.corpus import TokenCorpus
from megascale.data.packed_dataset import PackedDataset, PackedEvaluationDataset
from megascale.data.packing import Packs, best_fit_decreasing
from megascale.data.token_file import TokenFileWriter
from megascale.errors import UserError


def write(folder: Path, sizes: Sequence[int]) -> TokenCorpus:
    """Tokens 1, 2, 3, ...: token k + 1 is at position k, and 0 is padding."""
    with TokenFileWriter(folder / "corpus", np.int32) as writer:
        position = 1
        for size in sizes:
            writer.add_document([np.arange(position, position + size)])
            position += size
    return TokenCorpus.open(folder / "corpus")


def one_by_one(sizes: Sequence[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: room left in each bin, ascending."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bins_are_those_of_best_fit_decreasing(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 40))
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    bins, count = best_fit_decreasing(sizes, capacity)
    loads = np.bincount(bins, weights=sizes, minlength=count).astype(int)
    assert len(loads) == count
    assert sorted((capacity - loads).tolist()) == one_by_one(sizes.tolist(), capacity)


def test_bins_of_wide_samples() -> None:
    """Above 65,535 places sizes are sorted as wider integers."""
    sizes = np.array([70_000, 30_000, 40_001, 40_000, 1])
    bins, count = best_fit_decreasing(sizes, 100_001)
    loads = np.bincount(bins, weights=sizes, minlength=count).astype(int).tolist()
    assert sorted(loads) == [80_001, 100_001]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_target_is_in_one_sample_and_no_short_document_is_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    sizes.append(2)
    length = data.draw(st.integers(1, 25))
    corpus = write(tmp_path_factory.mktemp("packing"), sizes)
    with pytest.MonkeyPatch.context() as patch:  # several groups in so few documents
        patch.setattr(packing_module, "_GROUP", data.draw(st.integers(1, 40)))
        dataset = PackedEvaluationDataset(
            corpus, (0, corpus.num_tokens), length, "best_fit", isolate_documents=True
        )
        batch = dataset.batch(np.arange(len(dataset)))
    ends = np.cumsum(sizes)
    begins = set((ends - sizes + 1).tolist())
    targets = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(targets) == [t for t in range(1, corpus.num_tokens + 1) if t not in begins]
    counted = batch["labels"] != -100
    assert (batch["labels"][counted] == batch["input_ids"][counted] + 1).all()
    for begin, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
        if 2 <= end - begin <= length + 1:
            rows = (batch["input_ids"] == begin + 1).any(axis=1)
            assert rows.sum() == 1
            inputs = batch["input_ids"][np.flatnonzero(rows)[0]]
            # its last token is an input, unless it is the label of the last place
            assert np.isin(np.arange(begin + 1, end), inputs).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_document_a_sample(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = [*data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=20)), 3]
    length = data.draw(st.integers(1, 9))
    corpus = write(tmp_path_factory.mktemp("packing"), sizes)
    packs = Packs(corpus, (0, corpus.num_tokens), length, "one_document")
    starts = np.cumsum(sizes) - sizes
    expected = [
        [(start, min(size, length + 1))]
        for start, size in zip(starts.tolist(), sizes, strict=True)
        if size >= 2
    ]
    assert [packs.spans(number) for number in range(len(packs))] == expected
    report = packs.report
    assert (report.samples, report.documents) == (len(expected), len(sizes))
    assert report.without_target == sum(size < 2 for size in sizes)
    assert report.truncated == sum(size > length + 1 for size in sizes)
    assert report.tokens_left_out == sum(max(size - length - 1, 0) for size in sizes)
    places = sum(min(span[1], length) for (span,) in expected)
    assert report.padding == pytest.approx(1 - places / (len(expected) * length))


def test_samples_by_hand(tmp_path: Path) -> None:
    # 1 2 3 | 4 | (empty) | 5 6 7 8 9 | 10 11 with 7 places: 5..9 10 11 and 1 2 3
    corpus = write(tmp_path, [3, 1, 0, 5, 2])
    dataset = PackedEvaluationDataset(corpus, (0, 11), 6, "best_fit", isolate_documents=True)
    batch = dataset.batch(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [
        [2, 3, -100, -100, -100, -100],
        [6, 7, 8, 9, -100, 11],
    ]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    open_borders = PackedEvaluationDataset(corpus, (0, 11), 6, "best_fit").batch(np.array([1, 0]))
    assert set(open_borders) == {"input_ids", "labels"}
    assert open_borders["labels"].tolist() == [
        [2, 3, -100, -100, -100, -100],
        [6, 7, 8, 9, 10, 11],
    ]


def test_long_documents_give_full_samples_and_a_rest(tmp_path: Path) -> None:
    corpus = write(tmp_path, [10, 2, 9])  # 9 targets, 1, 8; with 4 a sample: 2 full + 1, 1, 2 full
    packs = Packs(corpus, (0, 21), 4, "best_fit")
    assert [packs.spans(number) for number in range(len(packs))] == [
        [(0, 5)],
        [(4, 5)],
        [(12, 5)],
        [(16, 5)],
        [(8, 2), (10, 2)],
    ]
    assert packs.lengths.tolist() == [4, 4, 4, 4, 4]
    assert str(packs.report) == "5 samples of 3 documents, 0.00% padding"


def test_a_part_begins_at_its_own_document(tmp_path: Path) -> None:
    corpus = write(tmp_path, [3, 4, 5, 6])
    packs = Packs(corpus, (3, 12), 8, "best_fit")
    assert [packs.spans(number) for number in range(len(packs))] == [[(3, 4), (7, 5)]]


def test_epochs_are_shuffled_and_tokens_counted_without_padding(tmp_path: Path) -> None:
    corpus = write(tmp_path, [3, 1, 0, 5, 2, 9, 4, 4, 2, 7])
    dataset = PackedDataset(corpus, (0, corpus.num_tokens), 6, 1, "one_document")
    count = dataset.samples_per_epoch
    epochs = [[dataset.spans(i + e * count)[0] for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    batch = dataset.batch(np.arange(3 * count))
    held = (batch["input_ids"] > 0).sum(axis=1)
    for first, length in ((0, 1), (3, 4), (1, 3 * count - 1), (0, 3 * count), (2, 0)):
        assert dataset.count_tokens(first, length) == held[first : first + length].sum()


@pytest.mark.parametrize("packing", ["best_fit", "one_document"])
def test_nothing_to_learn_is_refused(tmp_path: Path, packing: str) -> None:
    corpus = write(tmp_path, [1, 0, 1, 1])
    with pytest.raises(UserError, match="no document with two tokens"):
        Packs(corpus, (0, 3), 4, packing)  # type: ignore[arg-type]
