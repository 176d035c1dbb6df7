"""A lock on a path that the operating system takes back from a dead process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megascale.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class FileLock:
    """Holds a lock file until `release` or the end of the process.

    The lock is flock(2)'s: the kernel drops it with the process that held it, however that ended,
    so that a file left by a killed process locks nothing. Where a file system knows no locks (some
    network mounts), nothing is locked.

    Args:
        path: the lock file, in an existing local folder.
        refuse: makes the error for a lock that is taken, from who holds it.

    Raises:
        UserError: what `refuse` makes.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, refuse: Callable[[str], UserError]) -> None:
        self._path, self._refuse = path, refuse
        self._stream: IO[str] | None = None
        while self._stream is None:
            stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held)
            self._take(stream)
            # the one that held it before may have removed the file between open and flock
            if _is_same_file(stream, path):
                self._stream = stream
            else:
                stream.close()
        self._stream.truncate(0)
        self._stream.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        self._stream.flush()

    def _take(self, stream: IO[str]) -> None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            stream.seek(0)
            holder = stream.read(200) or "unknown"
            stream.close()
            raise self._refuse(holder) from error

    def was_taken_over(self) -> bool:
        """Whether there is another file at the path: this one was removed, and somebody came."""
        if self._stream is None or not self._path.exists():
            return False
        return not _is_same_file(self._stream, self._path)

    def release(self) -> None:
        """Give the path free; more than once does nothing."""
        if self._stream is None:
            return
        if not self.was_taken_over():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._stream.close()
        self._stream = None


def _is_same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
