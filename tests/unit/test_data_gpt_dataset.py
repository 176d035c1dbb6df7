"""Windows: what is in them, in which order they come, and where documents end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data.corpus import TokenCorpus
from megascale.data.gpt_dataset import EvaluationDataset, GPTDataset
from megascale.data.token_file import TokenFileWriter
from megascale.errors import UserError


def _corpus(folder: Path, document_lengths: Sequence[int]) -> TokenCorpus:
    """Tokens 0, 1, 2, ...: a token is its own position."""
    with TokenFileWriter(folder / "corpus", np.int32) as writer:
        position = 0
        for length in document_lengths:
            writer.add_document([np.arange(position, position + length)])
            position += length
    return TokenCorpus.open(folder / "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return _corpus(tmp_path_factory.mktemp("corpus"), [30, 1, 70, 0, 99])


def test_inputs_and_labels_are_one_token_apart(corpus: TokenCorpus) -> None:
    batch = GPTDataset(corpus, (10, 150), 8, seed=1).batch(np.arange(50))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (50, 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int64
    assert np.array_equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["input_ids"].min() >= 10
    assert batch["labels"].max() < 150


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_epoch_shows_each_window_once(corpus: TokenCorpus, data: st.DataObject) -> None:
    seq_length = data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, 100))
    stop = data.draw(st.integers(start + seq_length + 1, 200))
    dataset = GPTDataset(corpus, (start, stop), seq_length, seed=data.draw(st.integers(0, 9)))
    count = dataset.samples_per_epoch
    assert count == (stop - start - 1) // seq_length
    slack = stop - start - 1 - count * seq_length
    for epoch in (0, 1, 5):
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        assert {dataset.epoch_of(int(number)) for number in numbers} == {epoch}
        starts = np.sort(dataset.batch(numbers)["input_ids"][:, 0])
        offset = starts[0] - start
        assert 0 <= offset <= slack
        assert np.array_equal(starts, start + offset + np.arange(count) * seq_length)


def test_epochs_differ_and_reach_the_tail(corpus: TokenCorpus) -> None:
    dataset = GPTDataset(corpus, (0, 200), 20, seed=3)  # 9 windows, slack 19
    epochs = [dataset.batch(np.arange(9) + 9 * epoch)["input_ids"][:, 0] for epoch in range(60)]
    assert len({tuple(epoch - epoch.min()) for epoch in epochs}) > 50
    assert {int(epoch.min()) for epoch in epochs} >= {0, 19}


def test_a_sample_is_a_function_of_its_number(corpus: TokenCorpus) -> None:
    dataset = GPTDataset(corpus, (0, 200), 8, seed=3)
    whole = dataset.batch(np.arange(100))["input_ids"]
    again = GPTDataset(corpus, (0, 200), 8, seed=3).batch(np.array([77, 3, 3, 50]))["input_ids"]
    assert np.array_equal(again, whole[[77, 3, 3, 50]])
    assert dataset.window(77) == (whole[77, 0], 9)
    other = GPTDataset(corpus, (0, 200), 8, seed=4).batch(np.arange(100))["input_ids"]
    assert not np.array_equal(other, whole)


def test_order_depends_on_the_fingerprint(corpus: TokenCorpus, tmp_path: Path) -> None:
    other = _corpus(tmp_path, [100, 100])
    first, second = (
        GPTDataset(c, (0, 200), 8, seed=3).batch(np.arange(24)) for c in (corpus, other)
    )
    assert not np.array_equal(first["input_ids"], second["input_ids"])


def test_isolated_documents_by_hand(tmp_path: Path) -> None:
    # Documents 0 1 2 | 3 | (empty) | 4 5 6 7 8: one window of 8 inputs.
    corpus = _corpus(tmp_path, [3, 1, 0, 5])
    batch = GPTDataset(corpus, (0, 9), 8, seed=0, isolate_documents=True).batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [[1, 2, -100, -100, 5, 6, 7, 8]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]


def test_isolation_masks_the_label_just_past_the_window(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [4, 4])
    batch = GPTDataset(corpus, (0, 5), 4, seed=0, isolate_documents=True).batch(np.array([0]))
    assert batch["labels"].tolist() == [[1, 2, 3, -100]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0]]
    plain = GPTDataset(corpus, (0, 5), 4, seed=0).batch(np.array([0]))
    assert plain["labels"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("isolate", [False, True])
def test_evaluation_counts_every_target_once(corpus: TokenCorpus, isolate: bool) -> None:
    for seq_length, stop in [(8, 57), (8, 58), (8, 64), (8, 65), (200, 60), (1, 20)]:
        dataset = EvaluationDataset(corpus, (5, stop), seq_length, isolate_documents=isolate)
        batch = dataset.batch(np.arange(len(dataset)))
        counted = batch["labels"] != -100
        starts = {30, 31} if isolate else set()
        expected = [token for token in range(6, stop) if token not in starts]
        assert batch["labels"][counted].tolist() == expected
        assert (batch["labels"][counted] == batch["input_ids"][counted] + 1).all()


def test_evaluation_padding_is_a_document_of_its_own(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [3, 2, 4])
    dataset = EvaluationDataset(corpus, (0, 5), 8, isolate_documents=True)
    batch = dataset.batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, -100, 4, -100, -100, -100, -100]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert dataset.window(0) == (0, 5)


def test_too_few_tokens_are_refused_with_numbers(corpus: TokenCorpus) -> None:
    assert GPTDataset(corpus, (0, 9), 8, seed=0).samples_per_epoch == 1
    with pytest.raises(UserError, match=r"are 8 tokens(.|\n)*at least 9"):
        GPTDataset(corpus, (0, 8), 8, seed=0)
    with pytest.raises(UserError, match="are 1 tokens"):
        EvaluationDataset(corpus, (0, 1), 8)
