"""A piece of a file, read like a file of its own."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

_BUFFER_BYTES = 1 << 20


class _ByteRange(io.RawIOBase):
    """The bytes [start, stop) of a seekable stream, which it closes at the end."""

    def __init__(self, stream: BinaryIO, start: int, stop: int) -> None:
        super().__init__()
        stream.seek(start)
        self._stream, self._left = stream, stop - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with at most what is left; returns how many bytes."""
        content = self._stream.read(min(len(buffer), self._left))
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_range(stream: BinaryIO, start: int, stop: int) -> BinaryIO:
    """The bytes [start, stop) of `stream`; closing it closes `stream`."""
    return cast(BinaryIO, io.BufferedReader(_ByteRange(stream, start, stop), _BUFFER_BYTES))
