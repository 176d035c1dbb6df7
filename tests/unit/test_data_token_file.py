"""The bytes of .bin/.idx, what opening refuses, and that an error leaves nothing behind."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megascale.data import token_file
from megascale.data.token_file import TokenFile, TokenFileWriter, token_dtype
from megascale.errors import UserError


def _write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([np.array(sequence, dtype=np.int64) for sequence in document])


DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [], [[7, 8]]]


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_bytes_follow_the_published_layout(
    tmp_path: Path, dtype: type, code: int, letter: str
) -> None:
    _write(tmp_path / "a", DOCUMENTS, dtype)
    size = struct.calcsize(letter)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<8{letter}", *range(1, 9))
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 4, 5)
    expected += struct.pack("<4i", 3, 1, 2, 2)
    expected += struct.pack("<4q", 0, 3 * size, 4 * size, 6 * size)
    expected += struct.pack("<5q", 0, 1, 3, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == expected


def test_round_trip(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    opened = TokenFile(tmp_path / "a")
    assert opened.tokens.tolist() == list(range(1, 9))
    assert opened.sequence_lengths.tolist() == [3, 1, 2, 2]
    assert opened.document_starts().tolist() == [0, 3, 6, 6]
    assert (opened.num_tokens, opened.num_documents) == (8, 4)
    opened.check_index()
    with pytest.raises(ValueError, match="read-only"):
        opened.tokens[0] = 1


def test_pointers_are_right_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "_INDEX_CHUNK", 3)
    lengths = [1, 5, 2, 7, 3, 1, 4]
    _write(tmp_path / "a", [[[9] * length] for length in lengths])
    pointers = TokenFile(tmp_path / "a").sequence_pointers
    assert pointers.tolist() == [0, 2, 12, 16, 30, 36, 38]


def test_no_documents_and_empty_last_document(tmp_path: Path) -> None:
    _write(tmp_path / "none", [])
    assert TokenFile(tmp_path / "none").num_tokens == 0
    _write(tmp_path / "last", [[[1, 2]], []])
    assert TokenFile(tmp_path / "last").document_starts().tolist() == [0, 2]


def test_multimodal_modes_are_read_over(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    with open(tmp_path / "a.idx", "ab") as stream:
        stream.write(bytes(4))
    assert TokenFile(tmp_path / "a").num_documents == 4


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (200_000, np.int32)]
)
def test_token_dtype_has_megatrons_limit(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize(
    ("dtype", "bad"), [(np.uint16, 65_536), (np.uint16, -1), (np.int32, 2**31)]
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, dtype: type, bad: int) -> None:
    with pytest.raises(UserError, match=str(bad)):
        _write(tmp_path / "a", [[[1, bad]]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_earlier_files_untouched(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError):
        _write(tmp_path / "a", [[[1, 2]], [[65_536]]])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"no space to write .*a\.bin"):
        _write(tmp_path / "a", DOCUMENTS)
    assert list(tmp_path.iterdir()) == []


def _edit(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


@pytest.mark.parametrize(
    ("name", "offset", "content", "message"),
    [
        ("a.idx", 0, b"XX", "begins with"),
        ("a.idx", 9, struct.pack("<Q", 2), "version 2"),
        ("a.idx", 17, b"\x06", "dtype code 6"),
        ("a.idx", 17, b"\x63", "dtype code 99"),
        ("a.idx", 17, b"\x04", "a.bin is truncated: 16 bytes"),
        ("a.idx", 18, struct.pack("<Q", 5), "sequences"),
        ("a.idx", 34 + 12 * 4, struct.pack("<q", 1), "document indices run over 1"),
        ("a.idx", 34 + 12, struct.pack("<i", 9), "a.bin is truncated: 16 bytes, 30 expected"),
    ],
)
def test_a_damaged_header_is_refused(
    tmp_path: Path, name: str, offset: int, content: bytes, message: str
) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    _edit(tmp_path / name, offset, content)
    with pytest.raises(UserError, match=message) as caught:
        TokenFile(tmp_path / "a")
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
@pytest.mark.parametrize("missing", [1, 2, 15])
def test_truncation_is_refused(tmp_path: Path, name: str, missing: int) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - missing)
    with pytest.raises(UserError, match="truncated"):
        TokenFile(tmp_path / "a")


def test_a_longer_bin_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    with open(tmp_path / "a.bin", "ab") as stream:
        stream.write(b"\x00\x00")
    with pytest.raises(UserError, match="longer than its index"):
        TokenFile(tmp_path / "a")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match=r"no file .*a\.bin"):
        TokenFile(tmp_path / "a")


def test_check_index_finds_a_wrong_pointer(tmp_path: Path) -> None:
    _write(tmp_path / "a", DOCUMENTS)
    _edit(tmp_path / "a.idx", 34 + 16 + 8, struct.pack("<q", 4))
    with pytest.raises(UserError, match="pointers"):
        TokenFile(tmp_path / "a").check_index()
