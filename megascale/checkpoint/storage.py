"""Where checkpoints lie: a thin layer over fsspec with the durability that a commit needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megascale.errors import UserError

RETIRED_PREFIX = ".replaced_"
"""Name that a folder has while another one takes its place."""


@contextmanager
def explain_write_errors(path: str) -> Iterator[None]:
    """Turn what a file system refuses into an error that a user can act on."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free space, or lower checkpoint.keep_last; nothing saved before is lost",
            errno.EDQUOT: "raise the quota or lower checkpoint.keep_last",
            errno.EROFS: "choose a writable run.output_dir",
            errno.EACCES: "choose a run.output_dir that this user may write to",
        }
        raise UserError(
            f"cannot write {path}: {error.strerror or error}",
            rule="a checkpoint must be written whole",
            remedy=remedies.get(error.errno or 0, "check the disk, or choose another folder"),
        ) from error


class Storage:
    """A folder reached through fsspec: local path, or any URL that fsspec knows.

    Args:
        root: path or URL of the folder; it need not exist.
    """

    def __init__(self, root: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(root)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Full path of something below the root."""
        return "/".join([self.root.rstrip("/"), *parts])

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there."""
        return self.fs.exists(self.path(*parts))

    def size(self, *parts: str) -> int:
        """Size of a file in bytes."""
        return self.fs.size(self.path(*parts))

    def folders(self) -> list[str]:
        """Names of the folders directly below the root, sorted; empty when it does not exist."""
        if not self.fs.isdir(self.root):
            return []
        self.fs.invalidate_cache(self.root)
        entries = self.fs.ls(self.root, detail=True)
        return sorted(
            entry["name"].rstrip("/").split("/")[-1]
            for entry in entries
            if entry["type"] == "directory"
        )

    def make_folder(self, *parts: str) -> None:
        """Create a folder and its parents."""
        with explain_write_errors(self.path(*parts)):
            self.fs.makedirs(self.path(*parts), exist_ok=True)

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder with its contents, if it is there."""
        if self.exists(*parts):
            with explain_write_errors(self.path(*parts)):
                self.fs.rm(self.path(*parts), recursive=True)

    def open_read(self, *parts: str) -> IO[bytes]:
        """Open a file for reading; the caller closes it."""
        return self.fs.open(self.path(*parts), "rb")

    @contextmanager
    def open_write(self, *parts: str) -> Iterator[IO[bytes]]:
        """Open a file for writing; on a clean exit its bytes are on the device (fsync)."""
        path = self.path(*parts)
        with explain_write_errors(path):
            opened: Any = open(path, "wb") if self.is_local else self.fs.open(path, "wb")  # noqa: SIM115
            with opened as stream:
                yield stream
                if self.is_local:
                    stream.flush()
                    os.fsync(stream.fileno())

    def commit_folder(self, temporary: str, final: str) -> None:
        """Give a written folder its final name in one rename; an old one there is replaced.

        A reader sees either no folder, the old one, or the new one, never a half-written one.
        """
        with explain_write_errors(self.path(final)):
            self._commit(self.path(temporary), self.path(final), f"{RETIRED_PREFIX}{final}")

    def _commit(self, source: str, target: str, retired: str) -> None:
        if not self.is_local:
            self.fs.mv(source, target, recursive=True)
            return
        _fsync_folder(source)
        replaces = os.path.exists(target)
        if replaces:
            self.remove_folder(retired)
            os.rename(target, self.path(retired))
        os.rename(source, target)
        _fsync_folder(self.root)
        if replaces:
            self.remove_folder(retired)


def _fsync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
