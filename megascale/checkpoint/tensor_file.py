"""Streaming reader and writer of safetensors files.

The format is the library's own (8-byte header length, JSON header, raw little-endian data); it is
written here because the library can neither hash while writing nor read ranges through fsspec.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
import xxhash

from megascale.checkpoint.manifest import unique_keys
from megascale.checkpoint.storage import RangeReader
from megascale.errors import UserError

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_CHUNK = 4 * 1024 * 1024
_HASHED_CHUNK = 256 * 1024  # still in the processor's cache when it is written after its hash
BACKGROUND_CHUNK = 8 * 1024 * 1024
"""Bytes that a thread beside training hashes and writes at once.

It holds the interpreter's lock between such calls only. Were they many, training could wait often
for a thread of low priority that holds the lock and is not running.
"""


@dataclass(frozen=True)
class TensorStream:
    """A tensor that is made piece by piece while it is written, so that it never exists whole.

    Attributes:
        key: its name in the file.
        blocks: gives its elements in row-major order, as tensors of `dtype` and any shape.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    stream: IO[bytes], tensors: Mapping[str, torch.Tensor], chunk: int = _HASHED_CHUNK
) -> tuple[int, str]:
    """Write `tensors` (any device, made contiguous) and return (bytes written, xxh3_128 hex)."""
    whole = [_whole(key, tensor) for key, tensor in tensors.items()]
    return write_streams(stream, whole, chunk=chunk)


def _whole(key: str, tensor: torch.Tensor) -> TensorStream:
    return TensorStream(key, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def write_streams(
    stream: IO[bytes],
    tensors: Sequence[TensorStream],
    metadata: Mapping[str, str] | None = None,
    chunk: int = _HASHED_CHUNK,
) -> tuple[int, str]:
    """Write `tensors` one block after the other and return (bytes written, xxh3_128 hex).

    Args:
        metadata: strings for the header's `__metadata__`.
        chunk: bytes that are hashed and written at once.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    written = 0
    for block in (len(text).to_bytes(8, "little"), text):
        digest.update(block)
        written += stream.write(block)
    for tensor in tensors:
        for part in tensor.blocks():
            assert part.dtype == tensor.dtype, tensor.key
            data = _bytes_of(part.detach().cpu().contiguous())
            for begin in range(0, len(data), chunk):
                piece = data[begin : begin + chunk]
                digest.update(piece)
                written += stream.write(piece)
    assert written == 8 + len(text) + offset, "blocks that do not make up their tensors"
    return written, digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview[int]:
    """The memory of a contiguous CPU tensor, without a copy; writable when the tensor is."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file opened for range reads; reads only what is asked for.

    Args:
        stream: seekable binary stream.
        name: what errors call the file.
        size: size of the file in bytes.

    Raises:
        UserError: the header does not describe this file.
    """

    def __init__(self, stream: IO[bytes] | RangeReader, name: str, size: int) -> None:
        self._stream = stream
        self._name = name
        try:
            self._entries = _parse_header(stream, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{name} is not an intact safetensors file: {error}",
                rule="its header must describe its bytes",
                remedy="use another checkpoint; this one is damaged",
            ) from error

    def keys(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._entries)

    def numel(self, key: str) -> int:
        """Number of elements of a tensor."""
        return self._entry(key).numel

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._entry(key).dtype

    def read(self, key: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened tensor `key`, as a 1-D tensor."""
        entry = self._entry(key)
        count = entry.numel - start if numel is None else numel
        if start < 0 or count < 0 or start + count > entry.numel:
            raise UserError(
                f"{self._name}: elements {start}..{start + count} of {key!r} asked for",
                rule=f"the tensor has {entry.numel} elements",
                remedy="use another checkpoint; this one's manifest does not match its files",
            )
        out = torch.empty(count, dtype=entry.dtype)
        self._read_into(out, entry.begin + start * out.element_size(), key)
        return out

    def read_runs(self, key: str, runs: Sequence[tuple[int, int, int]], out: torch.Tensor) -> int:
        """Read several ranges of the flattened `key` into 1-D `out`.

        Args:
            runs: (first element in `out`, first element in the tensor, number of elements),
                ascending, without overlaps.
        """
        if not isinstance(self._stream, RangeReader):
            for into, start, numel in runs:
                self.read_into(key, start, out[into : into + numel])
            return sum(numel for _, _, numel in runs) * self.dtype(key).itemsize
        batches = _batches(runs, _CHUNK // self.dtype(key).itemsize)
        return sum(self._fetch_runs(self._stream, key, batch, out) for batch in batches)

    def _fetch_runs(
        self,
        stream: RangeReader,
        key: str,
        runs: Sequence[tuple[int, int, int]],
        out: torch.Tensor,
    ) -> int:
        """Those of one batch; returns the bytes fetched for them."""
        entry = self._entry(key)
        size = entry.dtype.itemsize
        spans = _spans([(start, start + numel) for _, start, numel in runs])
        if spans[0][0] < 0 or spans[-1][1] > entry.numel:
            self.read(key, spans[0][0], spans[-1][1] - spans[0][0])  # raises
        places = [(entry.begin + begin * size, entry.begin + end * size) for begin, end in spans]
        rest = list(reversed(runs))
        for (begin, end), data in zip(spans, stream.read_many(places), strict=True):
            if len(data) != (end - begin) * size:
                raise self._truncated(key)
            span = torch.frombuffer(bytearray(data), dtype=entry.dtype)
            while rest and rest[-1][1] < end:
                into, start, numel = rest.pop()
                out[into : into + numel].copy_(span[start - begin : start - begin + numel])
        return sum(end - begin for begin, end in places)

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + out.numel()) of the flattened `key` into 1-D `out`.

        Straight into its memory where type and device allow it, else through a small buffer.
        """
        entry = self._entry(key)
        if start < 0 or start + out.numel() > entry.numel:
            self.read(key, start, out.numel())  # raises
        size = entry.dtype.itemsize
        if out.dtype == entry.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_into(out.detach(), entry.begin + start * size, key)
            return
        step = _CHUNK // size
        for begin in range(0, out.numel(), step):
            part = out[begin : begin + step]
            part.copy_(self.read(key, start + begin, part.numel()))

    def _read_into(self, out: torch.Tensor, position: int, key: str) -> None:
        buffer = _bytes_of(out)
        self._stream.seek(position)
        filled = 0
        while filled < len(buffer):
            got = self._stream.readinto(buffer[filled : filled + _CHUNK])  # type: ignore[union-attr]
            if not got:
                raise self._truncated(key)
            filled += got

    def _truncated(self, key: str) -> UserError:
        return UserError(
            f"{self._name} ends in the middle of {key!r}",
            rule="a checkpoint's files must be whole",
            remedy="use another checkpoint; this one is truncated",
        )

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def _entry(self, key: str) -> _Entry:
        if key not in self._entries:
            raise UserError(
                f"{self._name} has no tensor {key!r}",
                rule="the manifest names it",
                remedy="use another checkpoint; this one's manifest does not match its files",
            )
        return self._entries[key]


def _batches(
    runs: Sequence[tuple[int, int, int]], limit: int
) -> Iterator[list[tuple[int, int, int]]]:
    """The runs, cut where they are longer than `limit`, in groups of at most so many elements."""
    batch: list[tuple[int, int, int]] = []
    filled = 0
    for into, start, numel in runs:
        done = 0
        while done < numel:
            part = min(numel - done, limit - filled)
            batch.append((into + done, start + done, part))
            done, filled = done + part, filled + part
            if filled == limit:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _spans(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs joined where the gap is not longer: fewer requests, and at most twice the bytes.

    So two tensor-parallel ranks fetch whole rows, more of them their own parts only.
    """
    spans: list[tuple[int, int]] = []
    for begin, end in runs:
        if spans and begin - spans[-1][1] <= end - begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
    return spans


def _parse_header(stream: IO[bytes] | RangeReader, size: int) -> dict[str, _Entry]:
    length = int.from_bytes(stream.read(8), "little") if size >= 8 else size
    if length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    header = json.loads(stream.read(length), object_pairs_hook=unique_keys)
    entries: dict[str, _Entry] = {}
    spans: list[tuple[int, int]] = []
    for key, item in header.items():
        if key == "__metadata__":
            continue
        dtype = _BY_NAME.get(item["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {key!r} has the unknown dtype {item['dtype']!r}")
        shape, (begin, end) = item["shape"], item["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"tensor {key!r} has the shape {shape} and bytes {begin}..{end}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {key!r} of shape {shape} claims bytes {begin}..{end}")
        spans.append((begin, end))
        entries[key] = _Entry(dtype, tuple(shape), 8 + length + begin)
    _check_spans(spans, size - 8 - length)
    return entries


def _check_spans(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors lie one after the other without holes or overlaps, as the format demands."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"bytes {begin}..{end} do not follow on {position}")
        position = end
    if position != size:
        raise ValueError(f"its tensors take {position} bytes of {size}")
