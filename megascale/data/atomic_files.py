"""Writing files and folders so that a final name only ever shows something complete.

Everything is written beside its final name, flushed to the disk, and renamed: a reader, a crash or
a full disk can never meet a half-written file under the name that others open.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megascale.data.places import DISK_FULL, Place, is_remote, open_binary, put_bytes
from megascale.errors import DiskFullError, UserError

_CHUNK_BYTES = 4 << 20
_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
)


@contextmanager
def full_disk_errors(path: Place) -> Iterator[None]:
    """Turn a full disk under `path` into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFullError(
            f"no space to write {path}: {error.strerror}",
            rule="the output and its temporary copy must fit on the disk and in every quota",
            remedy="free some space or choose another output path, then run the command again",
        ) from error


@contextmanager
def disk_errors(path: Place) -> Iterator[None]:
    """As `full_disk_errors`, and for a refused write too; nothing may be read in the block."""
    try:
        with full_disk_errors(path):
            yield
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            raise UserError(
                f"cannot write {path}: {error.strerror}",
                rule="the folder of an output must be there and writable",
                remedy="choose another output path or change the permissions",
            ) from error
        raise


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: Path) -> Path:
    """A hidden name beside `path` that says which process of which machine owns it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` by temporary file, fsync and rename; to a URL at once."""
    if is_remote(path):
        put_bytes(content, path)
        return
    temporary = temporary_sibling(path)
    with disk_errors(path):
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def file_checksum(path: Place) -> str:
    """xxh3_128 of a file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open_binary(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` by one rename when the block ends well.

    Args:
        path: final folder; its parents are made where absent.
        replaceable: asked, at the end, whether a non-empty folder already at `path` may go.

    Raises:
        UserError: `path` is taken and may not be replaced, or the disk is full.
    """
    path = Path(os.path.abspath(path))
    temporary = temporary_sibling(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_siblings(path)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            move_into_place(temporary, path, replaceable)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(temporary: Path, path: Path, replaceable: Callable[[Path], bool]) -> None:
    """Give a finished folder its final name; see `new_folder`.

    Raises:
        UserError: `path` is taken and may not be replaced.
    """
    previous = temporary.with_suffix(".old")
    if path.is_dir() and any(path.iterdir()) and replaceable(path):
        os.rename(path, previous)
    try:
        # rename() replaces an empty folder and refuses any other.
        os.rename(temporary, path)
    except OSError as error:
        if previous.exists():
            os.rename(previous, path)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"{path} appeared while it was being written",
            rule="one process writes one output folder",
            remedy="choose another output path, or remove that folder and run the command again",
        ) from error
    fsync_path(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for entry in sorted(folder.rglob("*"), reverse=True):
        fsync_path(entry)
    fsync_path(folder)


def _remove_abandoned_siblings(path: Path) -> None:
    """Remove temporary folders that a killed process of this machine left for the same output."""
    prefix = f".{path.name}.{socket.gethostname()}."
    for entry in path.parent.iterdir():
        owner = entry.name.removeprefix(prefix).removesuffix(".tmp")
        is_ours = entry.name == f"{prefix}{owner}.tmp" and owner.isdigit()
        if is_ours and not _lives(int(owner)):
            shutil.rmtree(entry, ignore_errors=True)


def _lives(process: int) -> bool:
    import psutil  # only where something lies about

    return psutil.pid_exists(process)
