"""Reading zstd streams to their true end.

The stream readers of fsspec and zstandard take a file that was cut off for one that ended: the rest
is lost without a word. This one raises EOFError, as gzip, bz2 and lzma do.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

_BLOCK_BYTES = 1 << 16


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of all frames of a stream.

    Args:
        source: positioned at the first frame; closed with this reader.

    Raises:
        EOFError: by reads, when the source ends inside a frame.
        zstandard.ZstdError: by reads, when it is damaged.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._decompressor = self._new()
        self._fed = False  # whether the present frame has begun
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one block goes; 0 at the end."""
        while not self._ready:
            block = self._source.read(_BLOCK_BYTES)
            if not block:
                if self._fed:
                    raise EOFError("compressed file ended inside a frame")
                return 0
            self._ready = memoryview(self._decompress(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the source too."""
        self._source.close()
        super().close()

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            parts.append(self._decompressor.decompress(block))
            self._fed = not self._decompressor.eof
            block = self._decompressor.unused_data
            if self._decompressor.eof:
                self._decompressor = self._new()
        return b"".join(parts)

    @staticmethod
    def _new() -> Any:
        return zstandard.ZstdDecompressor().decompressobj()


def open_zstd(source: BinaryIO) -> BinaryIO:
    """A buffered `ZstdReader`: lines can be read from it."""
    return io.BufferedReader(ZstdReader(source), buffer_size=1 << 18)
