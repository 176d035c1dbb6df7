"""Local paths and URLs of fsspec behind one interface, that of pathlib.

A URL becomes a `UPath` (universal_pathlib), which has pathlib's methods and no `__fspath__`: what
needs a file of this machine fails at once with it, and never opens a local "s3:/...".
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from posixpath import normpath, relpath
from typing import Any, BinaryIO, cast

from megascale.errors import DiskFullError, UserError

Place = str | os.PathLike[str]
DISK_FULL = (*DiskFullError.NUMBERS, errno.EFBIG)
_LOCAL = ("file", "local")


def as_path(place: Place) -> Path:
    """A path, or for a URL what has the methods of one; `file://` is a path of this machine.

    Raises:
        UserError: no file system of fsspec for the URL, or its package is not installed.
    """
    if not isinstance(place, str):
        return cast(Path, place)
    protocol, found, rest = place.partition("://")
    if not found:
        return Path(place)
    if protocol in _LOCAL:
        return Path(rest)
    from upath import UPath

    try:
        # A listing that is remembered does not show what another process wrote.
        path: Any = UPath(place, use_listings_cache=False)
        assert path.fs is not None  # made on first use, and then imports its package
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot open {place}: {error}",
            rule="a path is local, or a URL that fsspec knows (s3://, gs://, ...)",
            remedy="install the package that fsspec names (pip install 'megascale[s3]' for s3)",
        ) from error
    return cast(Path, path)


def is_remote(place: Place) -> bool:
    """Whether it lies in an object store or the like, and not on a disk of this machine."""
    return not isinstance(as_path(place), PurePath)


def location(path: Path) -> str:
    """What `as_path` makes the same path of, in any process: a URL, or an absolute path."""
    return str(path) if is_remote(path) else os.path.abspath(path)


def absolute(place: Place) -> Path:
    """The same place, whatever the working folder becomes."""
    return as_path(location(as_path(place)))


def below(folder: Path, *parts: str) -> Path:
    """A place relative to a folder; ".." goes up, and a part that is absolute or a URL stands for
    itself."""
    for part in parts:
        if "://" in part or not is_remote(folder):
            folder = as_path(part) if "://" in part else folder / part
            continue
        protocol, _, path = str(folder).partition("://")
        folder = as_path(f"{protocol}://{normpath(f'{path}/{part}')}")
    return folder


def relative_to(place: Path, folder: Path) -> str:
    """A place as seen from a folder of the same disk or store; undone by `below`."""
    return relpath(_without_protocol(place), _without_protocol(folder))


def _without_protocol(path: Path) -> str:
    return "/" + location(path).rpartition("://")[2].lstrip("/")


def open_binary(place: Place) -> BinaryIO:
    """Open a file, wherever it lies, for reading."""
    return as_path(place).open("rb")


def size_of(path: Path) -> int | None:
    """Bytes of a file, None where there is none."""
    try:
        return int(path.stat().st_size) if path.is_file() else None
    except FileNotFoundError:
        return None


def put_file(source: Path, target: Path) -> None:
    """Copy a local file into a store, where it appears when it is whole.

    Raises:
        UserError: the store refuses it, or has another size of it afterwards.
    """
    with remote_errors(target):
        _fs(target).put_file(os.fspath(source), _key(target))
        found, size = _fs(target).info(_key(target))["size"], source.stat().st_size
    if found != size:
        raise UserError(
            f"{target} has {found} bytes after {size} were written",
            rule="a store keeps what it is given",
            remedy="run the command again; finished shards are kept",
        )


def put_bytes(content: bytes, target: Path) -> None:
    """Write a small object; it appears whole."""
    with remote_errors(target):
        _fs(target).pipe_file(_key(target), content)


def get_file(source: Path, target: Path) -> None:
    """Copy an object to a local file.

    Raises:
        FileNotFoundError: there is no such object.
    """
    with remote_errors(source):
        _fs(source).get_file(_key(source), os.fspath(target))


def claim(content: bytes, target: Path) -> bool:
    """Write an object unless there is one; whether it was written.

    At once where the store knows conditional writes (S3, memory), else by a look before.
    """
    with remote_errors(target):
        if target.is_file():
            return False
        try:
            _fs(target).pipe_file(_key(target), content, mode="create")
        except FileExistsError:
            return False
        except TypeError:  # a file system that does not know the mode
            _fs(target).pipe_file(_key(target), content)
    return True


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with remote_errors(path):
        if path.exists():
            _fs(path).rm(_key(path), recursive=True)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with remote_errors(path):
        if path.is_file():
            _fs(path).rm_file(_key(path))


@contextmanager
def remote_errors(place: Place) -> Iterator[None]:
    """Turn what the client of a store raises into a `UserError`; those of local files stay, as do
    a missing file and a full disk."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if full or not is_remote(place):
            raise
        raise unreachable(place, error) from error


def unreachable(place: Place, error: Exception) -> UserError:
    """The error for a store that does not answer, or does not do what is asked."""
    return UserError(
        f"cannot reach {place}: {type(error).__name__}: {error}",
        rule="the server must answer, know the keys and allow what is asked",
        remedy="set the variables of its client (for s3: AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), or choose another place",
    )


def _fs(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    return str(cast(Any, path).path)
