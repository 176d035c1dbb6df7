"""Fill-in-the-middle: the text is all there, in the order that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.corpus import TokenCorpus
from megascale.data.fill_in_middle import FillInMiddle
from megascale.data.gpt_dataset import GPTDataset
from megascale.data.packed_dataset import PackedDataset
from megascale.data.token_file import TokenFileWriter

PRE, SUF, MID, EOD = 1001, 1002, 1003, 1000


def restored(row: list[int]) -> list[int]:
    """The text of a rearranged piece in its order."""
    suffix, middle = row.index(SUF), row.index(MID)
    assert row.index(PRE) == 0
    after, moved = row[suffix + 1 : middle], row[middle + 1 :]
    return row[1:suffix] + moved + after  # a SPM has nothing between <prefix> and <suffix>


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 30), spm=st.sampled_from([0.0, 1.0]), key=st.integers(0, 2**64 - 1))
def test_a_piece_keeps_its_text_but_for_three_tokens(size: int, spm: float, key: int) -> None:
    for ending in ([], [EOD]):
        row = np.array([*range(size), *ending])
        FillInMiddle(1.0, spm, PRE, SUF, MID, EOD).apply(row, [0, len(row)], key)
        body = row.tolist()[:size]
        assert row.tolist()[size:] == ending
        if size <= 3:
            assert body == list(range(size))
            continue
        assert restored(body) == list(range(size - 3))
        assert spm == 0.0 or body[1] == SUF


def test_rates() -> None:
    form = FillInMiddle(0.4, 0.25, PRE, SUF, MID, EOD)
    pieces, size = 4000, 20
    row = np.tile(np.arange(size), pieces)
    form.apply(row, list(range(0, size * pieces + 1, size)), key=9)
    rows = row.reshape(-1, size)
    moved = rows[:, 0] == PRE
    # a PSM whose prefix is empty looks like a SPM
    empty = 1 - ((size - 3) / (size - 2)) ** 2
    for share, expected in (
        (moved.mean(), 0.4),
        ((rows[:, 1] == SUF).mean(), 0.4 * (0.25 + 0.75 * empty)),
    ):
        assert abs(share - expected) < 6 * (expected * (1 - expected) / pieces) ** 0.5
    ends = [row.index(MID) - row.index(SUF) for row in rows[moved].tolist()]
    assert len(set(ends)) > size / 2  # cut in many places


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    prefix = tmp_path_factory.mktemp("middle") / "corpus"
    with TokenFileWriter(prefix, np.int32) as writer:
        position = 0
        for size in (30, 4, 0, 70, 9, 55):
            writer.add_document([np.append(np.arange(position, position + size), EOD)])
            position += size
    return TokenCorpus.open(prefix)


def test_borders_masks_and_packing_are_as_without(corpus: TokenCorpus, tmp_path: Path) -> None:
    form = FillInMiddle(1.0, 0.5, PRE, SUF, MID, EOD)
    part, numbers = (0, corpus.num_tokens), np.arange(40)
    pairs = (
        (GPTDataset(corpus, part, 20, 3, True), GPTDataset(corpus, part, 20, 3, True, form)),
        (
            PackedDataset(corpus, part, 40, 3, "best_fit", True),
            PackedDataset(corpus, part, 40, 3, "best_fit", True, form),
        ),
    )
    for plain, moved in ((a.batch(numbers), b.batch(numbers)) for a, b in pairs):
        for name in ("document_ids", "position_ids"):
            assert np.array_equal(plain[name], moved[name])
        assert np.array_equal(plain["labels"] == -100, moved["labels"] == -100)
        assert np.array_equal(plain["input_ids"] == EOD, moved["input_ids"] == EOD)
        assert (moved["input_ids"] == PRE).any(axis=1).mean() > 0.9
        # inputs and labels are still one token apart
        inside = moved["labels"][:, :-1] != -100
        assert (moved["labels"][:, :-1] == moved["input_ids"][:, 1:])[inside].all()


def test_a_sample_is_rearranged_alike_wherever_it_is_read(corpus: TokenCorpus) -> None:
    form = FillInMiddle(0.5, 0.5, PRE, SUF, MID, EOD)
    dataset = GPTDataset(corpus, (0, corpus.num_tokens), 16, 3, middle=form)
    whole = dataset.batch(np.arange(60))["input_ids"]
    again = GPTDataset(corpus, (0, corpus.num_tokens), 16, 3, middle=form)
    for number in (0, 59, 17):
        assert np.array_equal(again.batch(np.array([number]))["input_ids"][0], whole[number])
    # the same window in another epoch is cut elsewhere
    dataset = GPTDataset(corpus, (0, 161), 16, 3, middle=form)  # no slack: the same windows
    count = dataset.samples_per_epoch
    starts = [dataset.window(i)[0] for i in range(3 * count)]
    twice = [
        (i, j) for i in range(count) for j in range(count, 3 * count) if starts[i] == starts[j]
    ]
    assert twice
    batch = dataset.batch(np.arange(3 * count))["input_ids"]
    assert any(not np.array_equal(batch[i], batch[j]) for i, j in twice)
