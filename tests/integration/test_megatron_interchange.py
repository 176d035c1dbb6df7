"""Token files against the real reader and writer of megatron-core, in both directions."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.datasets.adopt import adopt
from data_prep.datasets.verify import verify
from data_prep.documents import DocumentUnit
from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize
from data_prep.train_tokenizer import TokenizerKind, TrainTokenizerOptions, train_tokenizer
from megascale.data.corpus import TokenCorpus
from megascale.data.gpt_dataset import GPTDataset
from megascale.data.token_file import TokenFile, TokenFileWriter
from megascale.data.tokenizer import load_tokenizer

SENTENCES = (
    "It was a bright cold day in April. The clocks were striking thirteen. Nobody looked up.",
    "He loved her. She did not know it, and the summer was long.",
    "One sentence only",
)


@pytest.fixture(scope="module")
def megatron() -> Any:
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bpe/ and wordpiece/ tokenizers, and gpt/ and bert/ datasets of the same documents."""
    root = tmp_path_factory.mktemp("interchange")
    (root / "text.txt").write_text("\n".join(SENTENCES * 20))
    for kind, size in ((TokenizerKind.BPE, 300), (TokenizerKind.WORDPIECE, 300)):
        options = TrainTokenizerOptions(size, kind, documents=DocumentUnit.LINE)
        train_tokenizer([str(root / "text.txt")], root / kind.value, options)
    for name, kind in (("gpt", "bpe"), ("bert", "wordpiece")):
        options_of = TokenizeOptions(DocumentUnit.LINE, bert=name == "bert")
        run = RunOptions(workers=1)
        tokenize([str(root / "text.txt")], root / name, root / kind, options_of, run)
    return root


def write_theirs(megatron: Any, prefix: Path, documents: list[list[list[int]]], dtype: Any) -> None:
    """With megatron's builder, as its preprocess_data does it."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.IntTensor(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def documents_of(shard: TokenFile) -> list[list[list[int]]]:
    bounds = np.append(shard.sequence_pointers // shard.dtype.itemsize, shard.num_tokens)
    sequences = [shard.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    index = shard.document_indices
    return [sequences[a:b] for a, b in itertools.pairwise(index)]


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_our_datasets_are_what_their_writer_writes(
    megatron: Any, folder: Path, tmp_path: Path, name: str
) -> None:
    prefix = folder / name / "shard_00000"
    shard = TokenFile(prefix)
    dtype = megatron.DType.optimal_dtype(300)
    assert shard.dtype == dtype
    documents = documents_of(shard)
    assert len(documents) == 60
    assert max(len(sequences) for sequences in documents) == (1 if name == "gpt" else 3)
    write_theirs(megatron, tmp_path / "theirs", documents, dtype)
    for suffix in ("bin", "idx"):
        ours, theirs = Path(f"{prefix}.{suffix}"), tmp_path / f"theirs.{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
    read = megatron.IndexedDataset(str(prefix))
    assert len(read) == len(shard.sequence_lengths)
    assert read.document_indices.tolist() == shard.document_indices.tolist()
    flat = [sequence for sequences in documents for sequence in sequences]
    assert [read[i].tolist() for i in range(len(read))] == flat


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_their_files_are_read_and_ours_are_theirs(
    megatron: Any, tmp_path: Path, dtype: Any
) -> None:
    chance = np.random.default_rng(0)
    top = 65_499 if dtype is np.uint16 else 150_000
    documents = [
        [chance.integers(0, top, chance.integers(0, 40)).tolist() for _ in range(count)]
        for count in chance.integers(1, 5, 50)
    ]
    write_theirs(megatron, tmp_path / "theirs", documents, dtype)
    shard = TokenFile(tmp_path / "theirs")
    shard.check_index()
    assert shard.dtype == dtype
    assert documents_of(shard) == documents
    one_by_one, at_once = tmp_path / "one_by_one", tmp_path / "at_once"
    with TokenFileWriter(one_by_one, dtype) as writer:
        for sequences in documents:
            writer.add_document([np.array(s, dtype=np.int64) for s in sequences])
    flat = [sequence for sequences in documents for sequence in sequences]
    with TokenFileWriter(at_once, dtype) as writer:
        writer.add_documents(
            np.concatenate([np.array(s, dtype=np.int64) for s in flat]),
            np.array([len(s) for s in flat]),
            np.array([len(sequences) for sequences in documents]),
        )
    for suffix in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{suffix}").read_bytes()
        assert Path(f"{one_by_one}.{suffix}").read_bytes() == theirs
        assert Path(f"{at_once}.{suffix}").read_bytes() == theirs


def test_training_reads_their_files_with_and_without_a_manifest(
    megatron: Any, folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folder / "bpe")
    ids = [[[*tokenizer.encode(text), tokenizer.eod_id]] for text in SENTENCES * 20]
    write_theirs(megatron, tmp_path / "m", ids, np.uint16)
    adopt([tmp_path / "m"], folder / "bpe", tmp_path / "adopted")
    assert not verify(tmp_path / "adopted", 1).problems
    bare, adopted = TokenCorpus.open(tmp_path / "m"), TokenCorpus.open(tmp_path / "adopted")
    ours = TokenCorpus.open(folder / "gpt")
    # the same tokens, so the same dataset: it does not matter which program wrote the files
    assert adopted.fingerprint == ours.fingerprint
    assert adopted.utf8_bytes == ours.utf8_bytes
    assert (bare.vocab_size, adopted.vocab_size) == (None, 300)
    for corpus in (bare, adopted):
        batch = GPTDataset(corpus, (0, corpus.num_tokens), 16, seed=1).batch(np.arange(4))
        assert batch["input_ids"].shape == (4, 16)


def test_the_peer_is_the_real_one(megatron: Any) -> None:
    assert Path(sys.modules["megatron.core"].__file__ or "").parts[-4:-1] == (
        "site-packages",
        "megatron",
        "core",
    )
    assert megatron.IndexedDataset.__module__ == "megatron.core.datasets.indexed_dataset"
