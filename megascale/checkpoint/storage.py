"""Where checkpoints lie: a thin layer over fsspec with the durability that a commit needs."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megascale.errors import DiskFullError, UserError

RETIRED_PREFIX = ".replaced_"
"""Name that a folder has while another one takes its place."""
WRITING_PREFIX = ".writing_"
"""Name that a folder has until it is complete."""
REMOVING_PREFIX = ".removing_"
"""Name that a folder has while its files are removed."""
SPARE_NAME = ".spare"
"""Name of a removed checkpoint's folder whose files the next save writes over."""
_OF_ONE_MACHINE = frozenset({"tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "f2fs", "overlay"})
"""File systems whose every reader is a process of this kernel, which tells of it (`_is_unread`)."""

Before = Callable[[str, str], None]
"""Called before each change with its kind (make, write, sync, rename, remove) and the path.

What it raises happens at that very point: tests end a save there, or fill the disk."""


def _go_on(change: str, path: str) -> None:
    """The usual `Before`: nothing happens."""


@contextmanager
def explain_write_errors(path: str) -> Iterator[None]:
    """Turn what a file system refuses into an error that a user can act on."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free space, or lower checkpoint.keep_last; nothing saved before is lost",
            errno.EDQUOT: "raise the quota or lower checkpoint.keep_last",
            errno.EROFS: "choose a writable run.output_dir or checkpoint.folder",
            errno.EACCES: "choose a run.output_dir that this user may write to",
        }
        full = error.errno in DiskFullError.NUMBERS
        raise (DiskFullError if full else UserError)(
            f"cannot write {path}: {error.strerror or error}",
            rule="a checkpoint must be written whole",
            remedy=remedies.get(error.errno or 0, "check the disk, or choose another folder"),
        ) from error


@contextmanager
def _explain_access(storage: Storage) -> Iterator[None]:
    """Turn what a client of an object store raises, which is no OSError, into a user's error."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if storage.is_local:
            raise
        raise UserError(
            f"cannot reach {storage.url}: {type(error).__name__}: {error}",
            rule="the server must answer, and know the keys",
            remedy="set the variables of its client (for s3: AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), or choose another folder",
        ) from error


class _Stream:
    """A file being written that announces each write."""

    def __init__(self, stream: IO[bytes], path: str, before: Before) -> None:
        self._stream, self._path, self._before = stream, path, before

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its length."""
        self._before("write", self._path)
        self._stream.write(data)
        return len(data)


def _space_of(old: str, path: str) -> int | str:
    """Move the file `old` to `path` and open it, not truncated; else `path`, which is free.

    It is left alone where another name leads to it, or a process has it open or mapped. This is
    asked after the move: who came by the old name is seen, and nobody comes by it any more.
    """
    with suppress(OSError):
        found = os.lstat(old)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            os.rename(old, path)
            with suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
                if _is_unread(descriptor):
                    return descriptor
                os.close(descriptor)
            os.unlink(path)
    return path


def _is_unread(descriptor: int) -> bool:
    """Whether no other descriptor or mapping of the file is left, in any process of this machine.

    The kernel grants a lease for writing to such a file only; it is given back at once.
    """
    try:
        # what an opener in between would send; by itself it means nothing to a process
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (OSError, AttributeError):  # held; or a system without leases
        return False
    return True


def _file_system(path: str) -> str:
    """Type of the file system of something that is there; "" where the system does not tell."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == number:
                return source.split()[0]
    return ""


class RangeReader:
    """A remote file of which just those bytes are fetched that are asked for.

    The files that fsspec opens read ahead: a rank that needs a slice of each tensor would fetch all
    that lies between.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._at = fs, path, 0

    def seek(self, position: int) -> int:
        """Continue at `position`, bytes from the begin."""
        self._at = position
        return position

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        data = self.read_many([(self._at, self._at + size)])[0] if size else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview[int]) -> int:
        """Fill `buffer` with what comes next; returns how much that was."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several spans [begin, end), in requests that do not wait for each other."""
        begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
        found = self._fs.cat_ranges([self._path] * len(spans), begins, ends, on_error="return")
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def close(self) -> None:
        """Nothing is held."""


class Storage:
    """A folder reached through fsspec: local path, or any URL that fsspec knows.

    Args:
        root: path or URL of the folder; it need not exist.
        before: see `Before`.

    Raises:
        UserError: no file system of fsspec for the URL, or its package is not installed.
    """

    def __init__(self, root: str, before: Before = _go_on) -> None:
        self.url = root
        self._before = before
        # a listing that is remembered does not show what another process wrote
        options = {"use_listings_cache": False} if "://" in root else {}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(root, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot open {root}: {error}",
                rule="a path is local, or a URL that fsspec knows (s3://, gs://, ...)",
                remedy="install the package that fsspec names (pip install 'megascale[s3]' for s3)",
            ) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Full path of something below the root, without the protocol."""
        return "/".join([self.root.rstrip("/"), *parts])

    def location(self, *parts: str) -> str:
        """What opens something below the root again: a path, or a URL."""
        base = self.root if self.is_local else self.url
        return "/".join([base.rstrip("/"), *parts])

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there."""
        if self.is_local:  # as fsspec does it, without what it gathers beside
            return os.path.lexists(self.path(*parts))
        with _explain_access(self):
            return self.fs.exists(self.path(*parts))

    def size(self, *parts: str) -> int:
        """Size of a file in bytes."""
        path = self.path(*parts)
        return os.path.getsize(path) if self.is_local else self.fs.size(path)

    def is_link(self, *parts: str) -> bool:
        """Whether a local file is reached through a link below the root."""
        if not self.is_local:
            return False
        below = os.path.relpath(os.path.realpath(self.path(*parts)), os.path.realpath(self.root))
        return below != os.path.join(*parts)

    def folders(self) -> list[str]:
        """Names of the folders directly below the root, sorted; empty when it does not exist."""
        with _explain_access(self):
            if not self.fs.isdir(self.root):
                return []
            entries = self.fs.ls(self.root, detail=True)
        return sorted(
            entry["name"].rstrip("/").split("/")[-1]
            for entry in entries
            if entry["type"] == "directory"
        )

    def make_folder(self, *parts: str) -> None:
        """Create a folder and its parents."""
        with _explain_access(self), explain_write_errors(self.path(*parts)):
            self._before("make", self.path(*parts))
            self.fs.makedirs(self.path(*parts), exist_ok=True)

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder with its contents, if it is there."""
        if self.exists(*parts):
            with explain_write_errors(self.path(*parts)):
                self._before("remove", self.path(*parts))
                self.fs.rm(self.path(*parts), recursive=True)

    def remove_file(self, *parts: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(*parts):
            with explain_write_errors(self.path(*parts)):
                self._before("remove", self.path(*parts))
                self.fs.rm_file(self.path(*parts))

    def open_read(self, *parts: str) -> IO[bytes]:
        """Open a file for reading; the caller closes it."""
        return self.fs.open(self.path(*parts), "rb")

    def open_ranges(self, *parts: str) -> IO[bytes] | RangeReader:
        """Open a file for reads here and there: of a remote one nothing beside them is fetched."""
        if self.is_local:
            return self.open_read(*parts)
        return RangeReader(self.fs, self.path(*parts))

    def is_of_one_machine(self) -> bool:
        """Whether the folder, which is there, lies on a disk or in memory of this machine alone."""
        return self.is_local and _file_system(self.root) in _OF_ONE_MACHINE

    @contextmanager
    def open_write(self, *parts: str, over: Sequence[str] = ()) -> Iterator[IO[bytes]]:
        """Open a file for writing; on a clean exit its bytes are on the device (fsync).

        Args:
            over: a local file that is not needed any more. Where it is there and nobody reads it,
                it is moved and written over, which costs much less than new space.
        """
        path = self.path(*parts)
        with _explain_access(self), explain_write_errors(path):
            self._before("write", path)
            opened: Any
            if self.is_local:
                opened = open(_space_of(self.path(*over), path) if over else path, "wb")  # noqa: SIM115
            else:
                opened = self.fs.open(path, "wb")
            with opened as stream:
                yield _Stream(stream, path, self._before)  # type: ignore[misc]
                if self.is_local:
                    stream.truncate()
                    stream.flush()
                    self._before("sync", path)
                    os.fsync(stream.fileno())

    def rename_folder(self, source: str, target: str) -> None:
        """Give a folder below the root another name that is free; at once on a local disk."""
        with explain_write_errors(self.path(target)):
            self._before("rename", self.path(source))
            if not self.is_local:
                self.fs.mv(self.path(source), self.path(target), recursive=True)
                return
            os.rename(self.path(source), self.path(target))
            self._sync_folder(self.root)

    def commit_folder(self, temporary: str, final: str) -> None:
        """Give a written folder its final name in one rename; an old one there is replaced.

        A reader sees either no folder, the old one, or the new one, never a half-written one.
        """
        with explain_write_errors(self.path(final)):
            if not self.is_local:
                self.rename_folder(temporary, final)
                return
            for folder, _, _ in os.walk(self.path(temporary)):
                self._sync_folder(folder)
            retired = f"{RETIRED_PREFIX}{final}"
            replaces = self.exists(final)
            if replaces:
                self.remove_folder(retired)
                self._before("rename", self.path(final))
                os.rename(self.path(final), self.path(retired))
            self.rename_folder(temporary, final)
            if replaces:
                self.remove_folder(retired)

    def _sync_folder(self, path: str) -> None:
        self._before("sync", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
