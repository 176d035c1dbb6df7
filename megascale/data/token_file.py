"""Megatron-compatible token files: `PREFIX.bin` (token ids) and `PREFIX.idx` (where they begin).

`.bin` holds the ids of all sequences back to back, without a header. `.idx`, little endian:

    bytes  content
    9      b"MMIDIDX" and two NUL
    8      u64 version, 1
    1      u8 dtype code (DTYPE_CODES)
    8      u64 S, the number of sequences
    8      u64 D, the number of documents + 1
    4 S    int32 sequence lengths in tokens
    8 S    int64 sequence pointers in bytes into .bin
    8 D    int64 document indices: the first sequence of each document, and S at the end
    S      int8 modes, multimodal files only (read over, never written)
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megascale.data.atomic_files import disk_errors, fsync_path, temporary_sibling
from megascale.data.places import as_path, is_remote
from megascale.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_HEADER = struct.Struct("<9sQBQQ")
_UINT16_VOCAB_LIMIT = 65_500  # Megatron's own limit: it keeps some ids of uint16 free
_MAX_SEQUENCE_LENGTH = 2**31 - 1
_INDEX_CHUNK = 1 << 20
_TOKENISE_AGAIN = "tokenise the corpus again with `python -m data_prep tokenize`"


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron stores ids of this vocabulary in: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCAB_LIMIT else np.int32)


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """The token file of a prefix, which may be a URL."""
    return _with_suffix(prefix, ".bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """The index file of a prefix, which may be a URL."""
    return _with_suffix(prefix, ".idx")


def _with_suffix(prefix: str | os.PathLike[str], suffix: str) -> Path:
    if is_remote(prefix):
        path = as_path(prefix)
        return path.with_name(path.name + suffix)
    return Path(f"{os.fspath(prefix)}{suffix}")


class TokenFileWriter:
    """Stream documents into `PREFIX.bin` and `PREFIX.idx`; nothing shows before a clean exit.

    Memory is 4 bytes a sequence and 8 bytes a document. On an error both temporary files go.

    Args:
        prefix: path without the `.bin`; its folder must exist.
        dtype: how ids are stored, see `token_dtype`.

    Raises:
        UserError: the disk is full, an id does not fit the dtype, a sequence is too long.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type) -> None:
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPE_CODES.items() if np.dtype(known) == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise UserError(
                f"tokens cannot be stored as {self.dtype}",
                rule="a .bin file holds uint8, int8, uint16, int16, int32 or int64 ids",
                remedy="use token_dtype(vocab_size)",
            )
        self._dtype_code = codes[0]
        self._bin_path, self._idx_path = bin_path(prefix), idx_path(prefix)
        self._bin_temporary = temporary_sibling(self._bin_path)
        self._idx_temporary = temporary_sibling(self._idx_path)
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        self._stream: BinaryIO | None = None

    def __enter__(self) -> TokenFileWriter:
        with disk_errors(self._bin_path):
            self._stream = open(self._bin_temporary, "wb")
        return self

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Append one document of one or more sequences, each a 1-D array of ids."""
        assert self._stream is not None, "add_document outside of the `with` block"
        with disk_errors(self._bin_path):
            for sequence in sequences:
                self._stream.write(self._stored(np.asarray(sequence)).tobytes())
                self._lengths.append(len(sequence))
        self._document_indices.append(len(self._lengths))

    def add_documents(
        self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray | None = None
    ) -> None:
        """Append many documents at once, which costs far less than one by one.

        Args:
            tokens: (N,) ids of all sequences, back to back.
            lengths: (S,) tokens of each sequence.
            sequences: (D,) sequences of each document; None: each sequence is a document.
        """
        assert self._stream is not None, "add_documents outside of the `with` block"
        assert int(lengths.sum()) == len(tokens)
        if sequences is None:
            sequences = np.ones(len(lengths), dtype=np.int64)
        assert int(sequences.sum()) == len(lengths)
        if lengths.size:
            self._check_length(int(lengths.max()))
        first = len(self._lengths)
        with disk_errors(self._bin_path):
            self._stream.write(self._in_dtype(tokens).data)
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        ends = first + np.cumsum(sequences, dtype=np.int64)
        self._document_indices.frombytes(ends.tobytes())

    def _stored(self, sequence: np.ndarray) -> np.ndarray:
        assert sequence.ndim == 1, "a sequence is a 1-D array"
        self._check_length(len(sequence))
        return self._in_dtype(sequence)

    def _check_length(self, tokens: int) -> None:
        if tokens > _MAX_SEQUENCE_LENGTH:
            raise UserError(
                f"a sequence of {tokens} tokens for {self._bin_path}",
                rule=f"the format holds at most {_MAX_SEQUENCE_LENGTH} tokens a sequence",
                remedy="cut the document into several",
            )

    def _in_dtype(self, sequence: np.ndarray) -> np.ndarray:
        if len(sequence) == 0:
            return sequence.astype(self.dtype)
        assert sequence.dtype.kind in "iu", "ids are integers"
        limits = np.iinfo(self.dtype)
        lowest = 0 if sequence.dtype.kind == "u" else int(sequence.min())
        highest = int(sequence.max())
        if lowest < limits.min or highest > limits.max:
            raise UserError(
                f"token ids {lowest}..{highest} in {self._bin_path}",
                rule=f"ids stored as {self.dtype} must lie in {limits.min}..{limits.max}",
                remedy="store this vocabulary with token_dtype(vocab_size)",
            )
        return sequence.astype(self.dtype.newbyteorder("<"), copy=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with disk_errors(self._bin_path):
                    self._commit()
        finally:
            self._close_after_error()

    def _commit(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        with open(self._idx_temporary, "wb") as stream:
            self._write_index(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # The index comes last: a prefix without an .idx is not a dataset.
        os.replace(self._bin_temporary, self._bin_path)
        os.replace(self._idx_temporary, self._idx_path)
        fsync_path(self._idx_path.parent)

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        documents = np.frombuffer(self._document_indices, dtype=np.int64)
        header = (MAGIC, VERSION, self._dtype_code, len(lengths), len(documents))
        stream.write(_HEADER.pack(*header))
        stream.write(lengths.astype("<i4", copy=False).tobytes())
        position = 0
        for begin in range(0, len(lengths), _INDEX_CHUNK):
            sizes = lengths[begin : begin + _INDEX_CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            stream.write((ends - sizes).astype("<i8").tobytes())
            position = int(ends[-1])
        stream.write(documents.astype("<i8", copy=False).tobytes())

    def _close_after_error(self) -> None:
        if self._stream is not None and not self._stream.closed:
            # The buffered rest may not fit on a full disk either; the first error is the one told.
            with suppress(OSError):
                self._stream.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)


class TokenFile:
    """A read-only memory map of one `.bin/.idx` pair; opening costs the same at any size.

    Attributes:
        tokens: (N,) all ids in file order.
        sequence_lengths: (S,) int32, in tokens.
        sequence_pointers: (S,) int64, in bytes.
        document_indices: (D,) int64, first sequence of each document, and S at the end.

    Raises:
        UserError: a file is absent, damaged, truncated, or does not belong to the other.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(
                    f"no file {path}",
                    rule="a tokenised dataset is a .bin and an .idx file of one name",
                    remedy=f"check the path, or {_TOKENISE_AGAIN}",
                )
        self.dtype, sequences, documents = read_header(self.idx_path)
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        offset = _HEADER.size
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, offset)
        offset += 4 * sequences
        self.sequence_pointers = np.frombuffer(index, "<i8", sequences, offset)
        offset += 8 * sequences
        self.document_indices = np.frombuffer(index, "<i8", documents, offset)
        self._check_against_bin()
        empty = self.bin_path.stat().st_size == 0  # an empty file cannot be mapped
        # A plain view: a slice of np.memmap runs Python code, and takes longer than its copy.
        self.tokens: np.ndarray = (
            np.empty(0, self.dtype)
            if empty
            else np.memmap(self.bin_path, self.dtype, mode="r").view(np.ndarray)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the file, empty ones included."""
        return len(self.document_indices) - 1

    def document_starts(self) -> np.ndarray:
        """(documents,) int64: the position in `tokens` of the first token of each document."""
        first = np.asarray(self.document_indices[:-1])
        positions = np.full(len(first), self.num_tokens, dtype=np.int64)
        # An empty document at the very end has no sequence to point at.
        within = first < len(self.sequence_pointers)
        positions[within] = self.sequence_pointers[first[within]] // self.dtype.itemsize
        return positions

    def sequence_starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions in [start, stop) at which a sequence begins; empty ones repeat."""
        size = self.dtype.itemsize
        first, last = np.searchsorted(self.sequence_pointers, (start * size, stop * size))
        return self.sequence_pointers[first:last] // size

    def check_index(self) -> None:
        """Read the whole index: pointers follow the lengths and documents ascend, else UserError.

        Takes time and memory in proportion to the number of sequences.
        """
        sizes = self.sequence_lengths.astype(np.int64) * self.dtype.itemsize
        ends = np.cumsum(sizes)
        if (sizes < 0).any() or not np.array_equal(ends - sizes, self.sequence_pointers):
            raise _damaged(self.idx_path, "the sequence pointers do not follow from the lengths")
        if (np.diff(self.document_indices) < 0).any():
            raise _damaged(self.idx_path, "the document indices do not ascend")

    def _check_against_bin(self) -> None:
        sequences = len(self.sequence_lengths)
        if self.document_indices[0] != 0 or self.document_indices[-1] != sequences:
            found = f"{self.document_indices[0]}..{self.document_indices[-1]}"
            raise _damaged(self.idx_path, f"document indices run over {found}, not 0..{sequences}")
        expected = 0
        if sequences:
            last = int(self.sequence_lengths[-1]) * self.dtype.itemsize
            expected = int(self.sequence_pointers[-1]) + last
        actual = self.bin_path.stat().st_size
        if actual != expected:
            state = "truncated" if actual < expected else "longer than its index says"
            raise UserError(
                f"{self.bin_path} is {state}: {actual} bytes, {expected} expected",
                rule=f"the .bin holds {expected // self.dtype.itemsize} tokens of "
                f"{self.dtype.itemsize} bytes, as {self.idx_path.name} says",
                remedy=f"copy both files again, or {_TOKENISE_AGAIN}",
            )


def read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, entries of the document index) of an index file.

    Raises:
        UserError: it is no such file, or its size is not what the header says.
    """
    with open(path, "rb") as stream:
        raw = stream.read(_HEADER.size)
    actual = path.stat().st_size
    if raw[: len(MAGIC)] != MAGIC:
        raise UserError(
            f"{path} begins with {raw[: len(MAGIC)]!r}",
            rule=f"a Megatron index begins with {MAGIC!r}",
            remedy=f"give the prefix of a .bin/.idx pair, or {_TOKENISE_AGAIN}",
        )
    if len(raw) < _HEADER.size:
        raise _damaged(path, f"{actual} bytes, but the header alone has {_HEADER.size}")
    _, version, code, sequences, documents = _HEADER.unpack(raw)
    if version != VERSION:
        raise UserError(
            f"{path} has version {version}",
            rule=f"this megascale reads version {VERSION}",
            remedy=_TOKENISE_AGAIN,
        )
    dtype = np.dtype(DTYPE_CODES.get(code, np.float64))
    if dtype.kind not in "iu":
        raise UserError(
            f"{path} has the dtype code {code}",
            rule="token ids are integers: dtype codes 1, 2, 3, 4, 5 and 8",
            remedy=_TOKENISE_AGAIN,
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if actual not in (expected, expected + sequences):
        what = f"{actual} bytes, but {sequences} sequences and {documents - 1} documents"
        raise _damaged(path, f"{what} need {expected}")
    if documents < 1:
        raise _damaged(path, "the document indices are missing")
    return dtype.newbyteorder("<"), sequences, documents


def read_index(prefix: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(sequence lengths (S,) int32, document indices (D,) int64) of an index, without its .bin.

    Raises:
        UserError: it is absent or damaged.
    """
    path = idx_path(prefix)
    if not path.is_file():
        raise _damaged(path, "it is missing")
    _, sequences, documents = read_header(path)
    index = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
    return lengths, np.frombuffer(index, "<i8", documents, _HEADER.size + 12 * sequences)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is truncated or damaged: {what}",
        rule="the .idx holds 34 bytes, 12 a sequence, and 8 a document and one more",
        remedy=f"copy both files again, or {_TOKENISE_AGAIN}",
    )
