"""Corpora: one stream over shards, manifests, checksums, and cutting into parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import DatasetManifest, ShardRecord, TokenizerRecord
from megascale.data.token_file import TokenFileWriter
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError


def _tokenizer_file(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    folder.mkdir(parents=True)
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    return folder


def _dataset(folder: Path, shards: Sequence[Sequence[int]]) -> Path:
    """A prepared dataset; `shards` are document lengths, tokens count up from 0."""
    tokenizer = load_tokenizer(_tokenizer_file(folder / "tokenizer"))
    position, records = 0, []
    for number, lengths in enumerate(shards):
        prefix = f"shard_{number:05d}"
        with TokenFileWriter(folder / prefix, np.uint16) as writer:
            for length in lengths:
                writer.add_document([np.arange(position, position + length)])
                position += length
        tokens = sum(lengths)
        records.append(ShardRecord.of_files(folder, prefix, len(lengths), tokens, 3 * tokens))
    record = TokenizerRecord(fingerprint=tokenizer.fingerprint, vocab_size=3, eod_id=0)
    DatasetManifest(tokenizer=record, shards=records).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _dataset(tmp_path / "set", [[10, 5], [], [7], [1, 20]])


def test_one_stream_over_all_shards(folder: Path) -> None:
    corpus = TokenCorpus.open(folder, verify=True)
    assert (corpus.num_tokens, corpus.num_documents) == (43, 5)
    assert corpus.document_starts.tolist() == [0, 10, 15, 22, 23]
    for start in range(43):
        for length in (0, 1, 6, 43 - start):
            if start + length <= 43:
                read = corpus.read(start, length)
                assert read.dtype == np.int64
                assert read.tolist() == list(range(start, start + length))
    for length in (1, 3, 8, 43):  # inside one shard, over two, over all
        starts = np.random.default_rng(length).permutation(44 - length)
        expected = starts[:, None] + np.arange(length)
        assert np.array_equal(corpus.read_windows(starts, length), expected)
    assert corpus.read_windows(np.zeros(0, dtype=np.int64), 4).shape == (0, 4)
    assert corpus.boundaries(10, 12).tolist() == [10, 15]
    assert corpus.boundaries(11, 12).tolist() == [15, 22]
    assert [str(part.shard)[-1] for part in corpus.documents_in(0, 43)] == list("00233")
    parts = [(p.document, p.start, p.stop) for p in corpus.documents_in(3, 21)]
    assert parts == [(0, 3, 10), (1, 0, 5), (0, 0, 7), (0, 0, 1), (1, 0, 1)]
    assert (corpus.vocab_size, corpus.eod_id, corpus.utf8_bytes) == (3, 0, 129)
    assert corpus.tokenizer is not None
    assert corpus.tokenizer.encode("ab") == [1, 2]


def test_a_megatron_prefix_needs_no_manifest(folder: Path) -> None:
    for name in ("shard_00000", "shard_00000.bin", "shard_00000.idx"):
        corpus = TokenCorpus.open(folder / name, verify=True)
        assert corpus.num_tokens == 15
        assert (corpus.tokenizer, corpus.vocab_size, corpus.eod_id) == (None, None, None)
    before = corpus.fingerprint
    assert TokenCorpus.open(folder / "shard_00000").fingerprint == before
    _flip_byte(folder / "shard_00000.bin", 29)
    assert TokenCorpus.open(folder / "shard_00000").fingerprint != before


def _flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_fingerprint_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert TokenCorpus.open(copy).fingerprint == TokenCorpus.open(folder).fingerprint
    other = _dataset(tmp_path / "other", [[10, 5], [], [7], [2, 19]])
    assert TokenCorpus.open(other).fingerprint != TokenCorpus.open(folder).fingerprint


@pytest.mark.parametrize("name", ["shard_00000.bin", "shard_00002.bin", "shard_00003.idx"])
def test_verify_names_the_file_with_a_flipped_byte(folder: Path, name: str) -> None:
    _flip_byte(folder / name, 45 if name.endswith("idx") else 3)
    TokenCorpus.open(folder)
    with pytest.raises(UserError, match=rf"{name} has the checksum"):
        TokenCorpus.open(folder, verify=True)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE({"<|endoftext|>": 0, "b": 1, "a": 2}, []))
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    corpus = TokenCorpus.open(folder)
    with pytest.raises(UserError, match="made with the tokenizer"):
        _ = corpus.tokenizer


def _change(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"version 3(.|\n)*newer"),
        ({"format": "x"}, "no dataset manifest"),
        ({"shards": []}, "shards"),
        ({"colour": "blue"}, "colour"),
        ({"tokenizer": {"fingerprint": "x", "vocab_size": 0, "eod_id": 0}}, "tokenizer.vocab_size"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    _change(folder, change)
    with pytest.raises(UserError, match=message):
        TokenCorpus.open(folder)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["prefix"] = "../set/shard_00000"
    _change(folder, {"shards": shards})
    with pytest.raises(UserError, match=r"shards\.0\.prefix"):
        TokenCorpus.open(folder)


def test_broken_folders_are_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*/set\?"):
        TokenCorpus.open(folder.parent / "sett")
    os.truncate(folder / "shard_00002.bin", 12)
    with pytest.raises(UserError, match=r"shard_00002\.bin is truncated.*12 bytes(.|\n)*14 bytes"):
        TokenCorpus.open(folder)
    (folder / "shard_00002.bin").unlink()
    with pytest.raises(UserError, match=r"shard_00002\.bin is missing"):
        TokenCorpus.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"not JSON(.|\n)*data_prep adopt"):
        TokenCorpus.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"give the prefix, for example .*shard_00000"):
        TokenCorpus.open(folder)


def test_split_cuts_at_the_nearest_document(folder: Path) -> None:
    corpus = TokenCorpus.open(folder)  # documents begin at 0, 10, 15, 22, 23; 43 tokens
    assert corpus.split([1.0]) == [(0, 43)]
    assert corpus.split([0.5, 0.5]) == [(0, 22), (22, 43)]
    assert corpus.split([0.3, 0.3, 0.4]) == [(0, 15), (15, 23), (23, 43)]
    assert corpus.split([0.2, 0.8]) == [(0, 10), (10, 43)]
    assert corpus.split([0.1 + 0.2, 0.7]) == [(0, 15), (15, 43)]


@pytest.mark.parametrize(
    ("fractions", "minimum", "message"),
    [
        ([], 1, "sums to 0"),
        ([0.9, 0.2], 1, "sums to 1.1"),
        ([1.5, -0.5], 1, "positive"),
        ([1.0, 0.0], 1, "positive"),
        ([float("nan"), 0.5], 1, "positive"),
        ([0.98, 0.02], 1, "part 1 .* would hold 0 tokens of 43 in 5 documents"),
        ([0.05, 0.95], 1, "part 0 .* would hold 0 tokens"),
        ([0.2, 0.8], 11, r"part 0 .* would hold 10 tokens(.|\n)*at least 11"),
    ],
)
def test_splits_that_cannot_be_are_refused(
    folder: Path, fractions: list[float], minimum: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TokenCorpus.open(folder).split(fractions, minimum)


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    corpus = TokenCorpus.open(_dataset(tmp_path / "one", [[100]]))
    with pytest.raises(UserError, match="in 1 documents"):
        corpus.split([0.5, 0.5])
