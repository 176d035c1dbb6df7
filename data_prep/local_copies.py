"""Files of an object store on this machine, for what has to map or scan them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.workplace import own_temporary_folder
from megascale.data.atomic_files import full_disk_errors
from megascale.data.dataset_cache import cached_dataset, copy_as_it_is
from megascale.data.places import get_file, is_remote, remote_errors


@contextmanager
def local_folder(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """The folder itself, or for a URL a temporary copy of its files that match `pattern`."""
    if not is_remote(folder):
        yield folder
        return
    with temporary_folder() as copy:
        with remote_errors(folder), full_disk_errors(copy):
            for path in folder.glob(pattern):
                if path.is_file():
                    get_file(path, copy / path.name)
        yield copy


@contextmanager
def local_mirror(dataset: Path) -> Iterator[Path]:
    """A dataset itself, or for a URL a temporary copy with all that is wrong with it."""
    if not is_remote(dataset):
        yield dataset
        return
    with temporary_folder() as copy:
        yield copy_as_it_is(dataset, copy)


@contextmanager
def local_pair(prefix: Path) -> Iterator[Path]:
    """The prefix of a .bin/.idx pair, or for a URL that of a temporary copy.

    Raises:
        UserError: there is no such pair in the store, or no space for a copy.
    """
    if not is_remote(prefix):
        yield prefix
        return
    with temporary_folder() as copy:
        yield cached_dataset(prefix, copy)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for scratch files that goes at the end."""
    with tempfile.TemporaryDirectory(dir=own_temporary_folder(), prefix="copy-") as folder:
        yield Path(folder)


def copies_folder() -> Path:
    """Where the commands keep copies of datasets that lie in a store."""
    return own_temporary_folder() / "datasets"
