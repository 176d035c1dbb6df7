"""Very large, very small, and what a model does not know."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megascale.data.blend import BlendedDataset, Stage
from megascale.data.corpus import TokenCorpus
from megascale.data.epochs import ShuffledEpochs
from megascale.data.gpt_dataset import EvaluationDataset, GPTDataset
from megascale.data.loader import BatchLoader
from megascale.data.packed_dataset import PackedDataset
from megascale.data.packing import Packs
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.errors import UserError

HUGE = 2**31 + 12_345  # tokens


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    """More than 2**31 tokens in three documents, of which the disk holds the last few."""
    prefix = tmp_path_factory.mktemp("sparse") / "corpus"
    sizes = np.array([2**31 - 1, 2_000, HUGE - 2**31 + 1 - 2_000])
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * HUGE)
        stream.seek(2 * (HUGE - 3_000))
        stream.write(np.arange(3_000, dtype=np.uint16).tobytes())
    pointers = 2 * (np.cumsum(sizes) - sizes)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4))
        for values, kind in ((sizes, "<i4"), (pointers, "<i8"), (np.arange(4), "<i8")):
            stream.write(values.astype(kind).tobytes())
    assert os.stat(f"{prefix}.bin").st_blocks < 10_000
    return TokenCorpus.open(prefix)


def test_positions_beyond_two_to_the_31(sparse: TokenCorpus) -> None:
    assert sparse.num_tokens == HUGE
    assert sparse.document_starts.tolist() == [0, 2**31 - 1, 2**31 + 1_999]
    assert sparse.split([0.5, 0.5])[1] == (2**31 - 1, HUGE)
    dataset = GPTDataset(sparse, (0, HUGE), 1024, seed=1, isolate_documents=True)
    starts = np.array([dataset.window(i)[0] for i in range(64)])
    assert starts.dtype == np.int64
    assert starts.min() >= 0
    assert len(set(starts.tolist())) == 64
    assert starts.max() > 2**30
    last = EvaluationDataset(sparse, (0, HUGE), 1000)
    batch = last.batch(np.array([len(last) - 1]))
    known = batch["labels"][batch["labels"] != -100]
    assert known[-1] == 2_999
    assert np.array_equal(known, np.arange(3_000 - len(known), 3_000))
    packs = Packs(sparse, (0, HUGE), 1024, "best_fit")
    assert len(packs) == (2**31 - 2) // 1024 + 1 + 10 + 3  # full ones, and three rests
    tail = packs.spans(len(packs) - 1)
    assert max(start for start, _ in tail) > 2**31
    assert int(packs.lengths.sum(dtype=np.int64)) > HUGE - 10_000
    assert sparse.documents_in(2**31 + 1_990, 20)[1].document == 2


def test_sample_numbers_beyond_two_to_the_31(sparse: TokenCorpus) -> None:
    dataset = GPTDataset(sparse, (0, HUGE), 8, seed=1)
    far = 2**40 + 5
    assert dataset.epoch_of(far) == far // dataset.samples_per_epoch
    assert dataset.batch(np.array([far]))["input_ids"].shape == (1, 8)
    blend = BlendedDataset([dataset, dataset], [Stage(0, (0, 1), (1, 1))], 0)
    assert blend.consumed(2**41).tolist() == [2**40, 2**40]
    _, inner = blend.locate(np.array([2**41]))
    assert inner.tolist() == [2**40]
    assert dataset.count_tokens(0, 2**40) == 2**43


def test_ids_above_65535(tmp_path: Path) -> None:
    ids = np.array([65_535, 65_536, 99_999, 7, 70_000])
    assert token_dtype(100_000) == np.int32
    with TokenFileWriter(tmp_path / "wide", token_dtype(100_000)) as writer:
        writer.add_document([ids])
    corpus = TokenCorpus.open(tmp_path / "wide")
    assert corpus.read(0, 5).tolist() == ids.tolist()
    assert GPTDataset(corpus, (0, 5), 4, 0).batch(np.array([0]))["labels"].tolist() == [
        ids[1:].tolist()
    ]
    with (
        pytest.raises(UserError, match=r"token ids 7\.\.99999"),
        TokenFileWriter(tmp_path / "narrow", np.uint16) as writer,
    ):
        writer.add_document([ids])


@pytest.mark.parametrize("wrong", [-1, 300])
def test_ids_that_the_model_does_not_know(tmp_path: Path, wrong: int) -> None:
    with TokenFileWriter(tmp_path / "corpus", np.int32) as writer:
        writer.add_document([np.array([5, 299, 3, 8, 1, 2, wrong, 4, 9])])
    dataset = GPTDataset(TokenCorpus.open(tmp_path / "corpus"), (0, 9), 4, 0)
    source = BlendedDataset([dataset], [Stage(0, (0,), (1,))], 0)
    assert BatchLoader(source, 2, 2, 0, 1, prefetch=False).load(0)
    loader = BatchLoader(source, 2, 2, 0, 1, prefetch=False, vocab_size=300)
    with pytest.raises(UserError, match=rf"sample \d holds the token id {wrong}\n(.|\n)*0\.\.299"):
        loader.load(0)
    known = BatchLoader(source, 2, 2, 0, 1, prefetch=False, vocab_size=301)
    assert wrong < 0 or known.load(0)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "one_document"])
def test_a_batch_of_more_samples_than_the_data_has(tmp_path: Path, packing: str) -> None:
    """Every pass is whole before the next begins, within one batch too."""
    with TokenFileWriter(tmp_path / "corpus", np.int32) as writer:
        for begin in (0, 10):
            writer.add_document([np.arange(begin, begin + 10)])
    corpus = TokenCorpus.open(tmp_path / "corpus")
    if packing == "concat":
        dataset = GPTDataset(corpus, (0, 19), 9, 0)  # no slack: the same two windows
    else:
        dataset = PackedDataset(corpus, (0, 20), 9, 0, packing)  # type: ignore[assignment,arg-type]
    assert dataset.samples_per_epoch == 2
    loader = BatchLoader(dataset, 101, 101, 0, 1, prefetch=False)
    first = loader.load(0)[0]["input_ids"][:, 0].numpy()
    again = loader.load(101)[0]["input_ids"][:, 0].numpy()
    pairs = np.append(first, again).reshape(-1, 2)
    assert (np.sort(pairs) == np.sort(pairs[0])).all()
    assert len({tuple(pair) for pair in pairs.tolist()}) == 2  # both orders occur


def test_a_set_of_one_sample(tmp_path: Path) -> None:
    epochs, places = ShuffledEpochs(1, 5).locate(np.array([0, 7, 2**40]))
    assert epochs.tolist() == [0, 7, 2**40]
    assert places.tolist() == [0, 0, 0]


def test_blocks_of_the_order_are_the_order() -> None:
    """What is kept for neighbours is what is computed for anyone."""
    for size in (1, 2, 63, 64, 5_000, 2**40):
        epochs = ShuffledEpochs(size, 9)
        numbers = np.arange(4_000, 4_200)
        computed = epochs._compute(numbers)
        for part in (numbers, numbers[90:99], numbers[::-1]):
            found = epochs.locate(part)
            assert np.array_equal(found[0], computed[0][part - 4_000])
            assert np.array_equal(found[1], computed[1][part - 4_000])
        far = np.array([5, 10_000_000])
        assert np.array_equal(epochs.locate(far)[1][:1], epochs.locate(far[:1])[1])
