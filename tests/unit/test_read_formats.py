"""Reading of every format, and of what is broken in it: counted by kind and named."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from data_prep.read.formats import read_items
from data_prep.read.options import DocumentUnit, FormatOptions
from data_prep.read.step import ReadOptions, named_inputs, prepare_read
from data_prep.records import Document, ShardWriter, read_documents, shard_paths
from data_prep.skips import SkipReport
from data_prep.sources import find_inputs
from data_prep.step import run_step
from megascale.errors import UserError

ROWS = [
    {"text": "one", "id": "a", "url": "u"},
    {"text": "two  ö"},
    {"text": "three\nlines", "id": 7},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [("one", 1, "a"), ("two  ö", 2, ""), ("three\nlines", 3, "7")]
MANY = b"".join(b'{"text": "%064x"}\n' % (n * 0x9E3779B97F4A7C15) for n in range(3000))


def _read(path: object, **options: Any) -> tuple[list[tuple[str, int, str]], dict[str, int]]:
    skips = SkipReport()
    items = read_items(find_inputs([str(path)]), FormatOptions(**options), skips)
    return [(item.text, item.position, item.id) for _, item in items], skips.counts


def _table() -> pa.Table:
    return pa.table({"text": [row["text"] for row in ROWS], "id": ["a", None, "7"]})


def test_jsonl_plain_and_packed(tmp_path: Path) -> None:
    packed = {
        "a.jsonl": JSONL,
        "b.jsonl.gz": gzip.compress(JSONL),
        "c.jsonl.zst": zstandard.compress(JSONL[:40]) + zstandard.compress(JSONL[40:]),
        "d.ndjson.xz": lzma.compress(JSONL),
    }
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        assert _read(tmp_path / name) == (EXPECTED, {}), name


def test_parquet_arrow_and_datasets_on_disk(tmp_path: Path) -> None:
    import datasets

    parquet.write_table(_table(), tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "b.arrow", _table().schema) as writer:
        writer.write_table(_table(), max_chunksize=2)
    with pa.ipc.new_stream(tmp_path / "c.arrow", _table().schema) as writer:
        writer.write_table(_table())
    expected = [("one", 1, "a"), ("two  ö", 2, ""), ("three\nlines", 3, "7")]
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert _read(tmp_path / name) == (expected, {}), name
        assert _read(tmp_path / name, text_key="body") == (
            [],
            {"row of a table without the column 'body'": 3},
        )
    data = datasets.Dataset.from_list([{"text": row["text"]} for row in ROWS])
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "hf")
    (tmp_path / "hf" / "train" / "cache-0123.arrow").write_bytes(b"a cache of a transform")
    texts = [text for text, _, _ in _read(tmp_path / "hf")[0]]
    assert texts == ["one", *(row["text"] for row in ROWS)]


def test_datatrove_output(tmp_path: Path) -> None:
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.writers import JsonlWriter

    with JsonlWriter(str(tmp_path / "theirs")) as writer:
        for number in range(3):
            writer.write(TheirDocument(f"text {number}", f"id/{number}", metadata={"n": number}))
    found, skipped = _read(tmp_path / "theirs", meta_keys=("metadata",))
    assert (found, skipped) == ([(f"text {n}", n + 1, f"id/{n}") for n in range(3)], {})


def test_html_and_html_in_jsonl(tmp_path: Path) -> None:
    body = "<p>The committee met in the old hall and heard three long reports.</p>" * 4
    page = f"<html><script>x()</script><nav>Home</nav><article><h1>T</h1>{body}</article></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text("<html><script>x()</script></html>")
    (found,), skipped = _read(tmp_path)
    assert "three long reports" in found[0]
    assert "x()" not in found[0]
    assert skipped == {"HTML without a main text": 1}
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": page}) + "\n")
    assert _read(tmp_path / "c.jsonl", extract_html=True)[0][0][0] == found[0]


def test_token_files_come_back_as_text(tmp_path: Path) -> None:
    from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize
    from data_prep.train_tokenizer import TrainTokenizerOptions, train_tokenizer

    (tmp_path / "a.jsonl").write_bytes(JSONL)
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", TrainTokenizerOptions(260))
    output = tmp_path / "set"
    tokenize([str(tmp_path / "a.jsonl")], output, tmp_path / "t", TokenizeOptions(), RunOptions(1))
    expected = [(row["text"], number, "") for number, row in enumerate(ROWS, start=1)]
    assert _read(output) == (expected, {})
    for one in ("shard_00000.bin", "shard_00000"):  # or the prefix of a pair
        assert _read(output / one, tokenizer=tmp_path / "t") == (expected, {})
    (output / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no tokenizer is given"):
        _read(output)


@pytest.mark.parametrize("cut", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["gz", "zst", "xz"])
def test_a_truncated_archive_gives_what_is_whole_and_is_told(
    tmp_path: Path, kind: str, cut: float
) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}[kind]
    content = pack(MANY)
    (tmp_path / f"a.jsonl.{kind}").write_bytes(content[: int(len(content) * cut)])
    found, skipped = _read(tmp_path / f"a.jsonl.{kind}")
    assert skipped == {"truncated or damaged archive": 1}
    assert len(found) < 3000 or cut == 0.999
    assert all(len(text) == 64 for text, _, _ in found)
    assert found == _read_plain(tmp_path)[: len(found)]


@pytest.mark.parametrize("kind", ["gz", "zst", "xz"])
def test_an_archive_with_another_checksum_is_told(tmp_path: Path, kind: str) -> None:
    """The text is whole to the end here; that it may be wrong is known at the end only."""
    pack = {
        "gz": gzip.compress,
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        "xz": lzma.compress,
    }[kind]
    content = bytearray(pack(MANY))
    content[-6 if kind == "gz" else -2] ^= 1
    (tmp_path / f"a.jsonl.{kind}").write_bytes(bytes(content))
    found, skipped = _read(tmp_path / f"a.jsonl.{kind}")
    assert skipped == {"truncated or damaged archive": 1}
    assert found == _read_plain(tmp_path)[: len(found)]


def _read_plain(tmp_path: Path) -> list[tuple[str, int, str]]:
    (tmp_path / "plain.jsonl").write_bytes(MANY)
    return _read(tmp_path / "plain.jsonl")[0]


def test_damaged_tables_are_told(tmp_path: Path) -> None:
    stream = io.BytesIO()
    parquet.write_table(_table(), stream)
    (tmp_path / "a.parquet").write_bytes(stream.getvalue()[:-20])
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, _table().schema) as writer:
        writer.write_table(_table())
    (tmp_path / "c.arrow").write_bytes(sink.getvalue()[:-60])
    found, skipped = _read(tmp_path / "*.*")
    assert (found, skipped) == ([], {"truncated or damaged table": 3})


def test_bad_lines_and_rows_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "bad \xff"}',
        b"{",
        b"[]",
        b'{"body": 1}',
        b'{"text": 5}',
        b'{"text": " "}',
        b'{"text": "' + b"x" * 200 + b'"}',
        b'{"text": "nul \\u0000 stays"}',
        b'{"text": "lone \\ud800"}',
        b"",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = _read(tmp_path / "a.jsonl", max_document_bytes=100)
    assert [text for text, _, _ in found] == ["good", "nul \x00 stays"]
    assert found[1][1] == 9
    assert skipped == {
        "malformed json line": 3,
        "json line that is no object": 1,
        "json line without the key 'text'": 1,
        "json line whose text is no string": 1,
        "empty document": 1,
        "document over 100 bytes": 1,
    }
    (tmp_path / "big.txt").write_bytes(b"a" * 90 + b"\n" + b"b" * 90 + b"\n\nc\n")
    limited = {"max_document_bytes": 100}
    over = {"document over 100 bytes": 1}
    assert _read(tmp_path / "big.txt", **limited) == ([], over)
    assert _read(tmp_path / "big.txt", unit=DocumentUnit.PARAGRAPH, **limited) == (
        [("c", 4, "")],
        over,
    )
    assert len(_read(tmp_path / "big.txt", unit=DocumentUnit.LINE, **limited)[0]) == 3
    table = pa.table({"text": ["a", None, " ", "x" * 200]})
    parquet.write_table(table, tmp_path / "b.parquet")
    found, skipped = _read(tmp_path / "b.parquet", **limited)
    assert (len(found), sum(skipped.values())) == (1, 3)


def _strings(kind: pa.DataType, *values: bytes) -> pa.Array:
    """Strings that nobody has looked at: arrow checks no UTF-8 of a file either."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers).cast(kind)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str
)
def test_a_row_that_is_not_utf8_costs_no_other_row(tmp_path: Path, kind: pa.DataType) -> None:
    column = _strings(kind, b"one", b"caf\xe9", "drei \u4e2d".encode())
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": kind})) as writer:
        writer.write_table(pa.table({"text": column}))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        found, skipped = _read(tmp_path / name)
        assert found == [("one", 1, ""), ("drei \u4e2d", 3, "")], name
        assert skipped == {"row that is not UTF-8": 1}, name


def test_tables_with_odd_columns(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    expected = {"row of a table with several columns 'text'": 2}
    assert _read(tmp_path / "twice.parquet") == ([], expected)

    words = pa.table({"text": pa.array(["a", None, "b", "a"]).dictionary_encode()})
    parquet.write_table(words, tmp_path / "words.parquet")
    found, skipped = _read(tmp_path / "words.parquet")
    assert [text for text, _, _ in found] == ["a", "b", "a"]
    assert skipped == {"row whose text is no string": 1}

    names = pa.table({"text": ["a", "b"], "id": _strings(pa.string(), b"x", b"\xe9")})
    parquet.write_table(names, tmp_path / "names.parquet")
    assert _read(tmp_path / "names.parquet") == ([], {"truncated or damaged table": 1})


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_through_fsspec_into_shards_of_a_size(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/in/deep/a.jsonl.gz", gzip.compress(JSONL * 40))
    memory.pipe("/in/b.txt", "Größe\n".encode() * 50)
    form = FormatOptions(DocumentUnit.LINE, meta_keys=("url",))
    inputs = named_inputs(["mine=memory://in"])
    result = run_step(prepare_read(inputs, tmp_path / "out", ReadOptions(form, 300)), 1)
    assert result.report["sources"] == {"mine": {"documents": 170, "text_bytes": 40 * 21 + 50 * 7}}
    paths = shard_paths(tmp_path / "out")
    # the text is cut before it is read, the packed file while it is
    names = [path.name.removesuffix(".jsonl.zst") for path in paths]
    assert names == ["shard_00000", "shard_00001", "shard_00002", *_further("shard_00002", 2)]
    documents = [[d for _, d in read_documents(path)] for path in paths]
    sizes = [sum(len(d.text.encode()) for d in shard) for shard in documents]
    assert all(300 <= size < 330 for size in sizes[2:-1])
    assert [len(shard) for shard in documents[:2]] == [26, 24]
    assert documents[0][2] == Document("Größe", "mine/b.txt:3", "mine")
    assert documents[2][0] == Document("one", "a", "mine", {"url": "u"})
    assert documents[2][1].id == "mine/deep/a.jsonl.gz:2"
    ids = [d.id for shard in documents for d in shard if d.id not in ("a", "7")]
    assert len(set(ids)) == len(ids) == 90


def _further(name: str, count: int) -> list[str]:
    return [f"{name}_{number:05d}" for number in range(1, count + 1)]


def test_a_file_system_that_refuses_is_told(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: str) -> bool:
        raise RuntimeError("Unable to locate credentials")  # s3fs lets such errors through

    monkeypatch.setattr(type(memory), "isfile", refuse)
    with pytest.raises(UserError, match=r"memory://in cannot be looked at.*locate credentials"):
        find_inputs(["memory://in"])


def test_shards_of_documents_are_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.jsonl.zst"
    documents = [Document("a\nb", "1", "s"), Document("ö" * 3, "2", "s", {"k": [1]})]
    with ShardWriter(path) as writer:
        for document in documents:
            writer.write(document)
    assert [document for _, document in read_documents(path)] == documents
    content = path.read_bytes()
    for wrong, what in [
        (content[:-3], "ended inside a frame"),
        (zstandard.compress(b'{"text": "a"}'), "inside a line"),
        (zstandard.compress(b'{"a": 1}\n'), 'no object with a string "text"'),
        (b"not packed", "no whole shard"),
    ]:
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=what):
            list(read_documents(path))
    with pytest.raises(UserError, match="holds no shard"):
        shard_paths(tmp_path / "none")


def test_inputs_of_one_name_are_refused() -> None:
    assert [item.name for item in named_inputs(["a/wiki/*.jsonl.gz", "n=b.txt", "c.txt.zst"])] == [
        "wiki",
        "n",
        "c",
    ]
    with pytest.raises(UserError, match="2 inputs are named a"):
        named_inputs(["x/a.txt", "y/a.jsonl"])
