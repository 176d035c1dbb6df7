"""Inputs cut into shards: nothing lost, nothing twice, the same documents for any shard size."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.documents import DocumentUnit, iterate_documents
from data_prep.input_shards import cut_inputs, default_shard_bytes, parse_size
from data_prep.skips import SkipReport
from data_prep.sources import find_inputs
from megascale.data.token_file import TokenFile, TokenFileWriter
from megascale.errors import UserError

PIECES = st.sampled_from(
    [b"word", b"\n", b"\n\n", b" ", b"\xef\xbb\xbf", "Größe".encode(), b"\xff", b"\r\n", b"\x00"]
)


@settings(max_examples=80, deadline=None)
@given(
    contents=st.lists(st.lists(PIECES, max_size=40).map(b"".join), min_size=1, max_size=3),
    unit=st.sampled_from([DocumentUnit.LINE, DocumentUnit.PARAGRAPH]),
    shard_bytes=st.integers(1, 60),
)
def test_shards_hold_the_documents_of_the_whole(
    contents: list[bytes], unit: DocumentUnit, shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(contents):
            Path(folder, f"{number}.txt").write_bytes(content)
        files = find_inputs([folder])
        whole, skips = SkipReport(), SkipReport()
        wanted = list(iterate_documents(files, unit, "text", whole))
        tasks = cut_inputs(files, unit, shard_bytes)
        found = [
            document
            for task in tasks
            for document in iterate_documents(task.content, unit, "text", skips)
        ]
    assert found == wanted
    bad = "line that is not UTF-8"
    assert skips.counts.get(bad) == whole.counts.get(bad)
    assert sum(task.size for task in tasks) == sum(map(len, contents))
    assert [task.name for task in tasks] == [f"shard_{i:05}" for i in range(len(tasks))]


def test_small_files_are_put_together_and_large_ones_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 100)  # 1400 bytes
    for name in ("b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text("12345\n" * 10)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(bytes(range(256)) * 10))
    tasks = cut_inputs(find_inputs([str(tmp_path)]), DocumentUnit.FILE, 500)
    names = [[file.name.removeprefix(f"{tmp_path}/") for file in task.content] for task in tasks]
    assert names[:3] == [["a.jsonl"], ["a.jsonl@476"], ["a.jsonl@938"]]
    assert names[3:] in (
        [["b.txt", "c.txt", "d.txt"], ["e.jsonl.gz"]],
        [["b.txt", "c.txt", "d.txt", "e.jsonl.gz"]],
    )
    assert [task.size for task in tasks[:3]] == [476, 462, 462]


def test_sizes(tmp_path: Path) -> None:
    assert parse_size("64MB") == 64_000_000
    assert parse_size(" 1.5 gb ") == 1_500_000_000
    assert parse_size("7") == 7
    for wrong in ("", "MB", "-1", "0", "3 parsecs", "1e3"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(wrong)
    assert default_shard_bytes(10**6) == 64_000_000
    assert default_shard_bytes(10**12) * 1024 >= 10**12


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=12),
    batches=st.integers(1, 4),
)
def test_many_documents_at_once_are_those_one_by_one(
    documents: list[list[int]], batches: int
) -> None:
    chance = np.random.default_rng(0)
    texts = [[chance.integers(0, 60_000, n) for n in lengths] for lengths in documents]
    with tempfile.TemporaryDirectory() as folder:
        with TokenFileWriter(Path(folder, "one"), np.uint16) as writer:
            for sequences in texts:
                writer.add_document(sequences)
        with TokenFileWriter(Path(folder, "many"), np.uint16) as writer:
            for part in np.array_split(np.arange(len(texts)), batches):
                flat = [sequence for i in part.tolist() for sequence in texts[i]]
                writer.add_documents(
                    np.concatenate([np.empty(0, np.int64), *flat]),
                    np.array([len(sequence) for sequence in flat], dtype=np.int64),
                    np.array([len(texts[i]) for i in part.tolist()], dtype=np.int64),
                )
        TokenFile(Path(folder, "many")).check_index()
        for suffix in ("bin", "idx"):
            one, many = (Path(folder, f"{name}.{suffix}") for name in ("one", "many"))
            assert one.read_bytes() == many.read_bytes()
