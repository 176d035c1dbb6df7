"""One run writes one folder: a lock that the operating system takes back from a dead process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from megascale.checkpoint.storage import explain_write_errors
from megascale.errors import UserError

LOCK_NAME = ".run.lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunLock:
    """Holds a local folder for one run until `release` or the end of the process.

    The lock is flock(2)'s: the kernel drops it with the process that held it, however that ended,
    so that a file left by a killed run locks nothing. Where a file system knows no locks (some
    network mounts), the folder goes unlocked.

    Args:
        folder: a local folder; made when it is not there.
        setting: which setting named it, for the refusal.

    Raises:
        UserError: another run holds it, or the folder cannot be written to.
    """

    def __init__(self, folder: str, setting: str = "run.output_dir") -> None:
        self._path, self._setting = Path(folder) / LOCK_NAME, setting
        with explain_write_errors(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] | None = None
        while self._stream is None:
            with explain_write_errors(str(self._path)):
                stream = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 (held)
            self._take(stream)
            # the one that held it before may have removed the file between open and flock
            if _is_same_file(stream, self._path):
                self._stream = stream
            else:
                stream.close()
        self._stream.truncate(0)
        self._stream.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        self._stream.flush()

    @property
    def folder(self) -> str:
        """The folder that it holds."""
        return str(self._path.parent)

    def _take(self, stream: IO[str]) -> None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            stream.seek(0)
            holder = stream.read(200) or "unknown"
            stream.close()
            raise UserError(
                f"another run is writing to {self._path.parent}: {holder}",
                rule="two runs in one folder would overwrite each other's checkpoints",
                remedy=f"wait for it or end it, or choose another {self._setting}",
            ) from error

    def release(self) -> None:
        """Give the folder free; more than once does nothing."""
        if self._stream is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._stream.close()
        self._stream = None


def _is_same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
