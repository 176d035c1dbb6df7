"""Datasets of an object store, copied once to a disk of each machine: training maps its files.

    CACHE/<xxh3 of manifest.json>/        a copy, as a dataset of its own
    CACHE/.<xxh3>.unfinished/             one that is not complete; its shards are taken up again
    CACHE/.<xxh3>.lock                    held while it is made: the machine's other processes wait

The name covers the checksums of all files, so a dataset that changes is copied anew under another
name, and none is ever removed: remove a folder when its space is needed.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import xxhash

from megascale.data.atomic_files import disk_errors, file_checksum, full_disk_errors, sync_tree
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord
from megascale.data.places import get_file, open_binary, remote_errors, size_of
from megascale.data.token_file import bin_path, idx_path
from megascale.errors import UserError

_COPIES_AT_A_TIME = 4
_VERSION_KEYS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created")


def cached_dataset(source: Path, cache: Path) -> Path:
    """The local copy of a dataset, or of a Megatron prefix, in an object store.

    A dataset's files are compared with the checksums of its manifest while they are copied, those
    of a prefix by size only.

    Args:
        source: the dataset's folder, or the prefix (with or without `.bin`), as a URL.
        cache: local folder, made where absent.

    Returns:
        The folder of the copy, or its prefix.

    Raises:
        UserError: nothing there, another checksum than the manifest's, or no space in the cache.
    """
    with remote_errors(source), full_disk_errors(cache):
        if (source / MANIFEST_NAME).is_file():
            with open_binary(source / MANIFEST_NAME) as stream:
                key = xxhash.xxh3_128_hexdigest(stream.read())
            with _copy(source, cache, key) as folder:
                if folder is not None:
                    _copy_dataset(source, folder)
            return cache / key
        prefix = source.with_suffix("") if source.suffix in (".bin", ".idx") else source
        files = (bin_path(prefix), idx_path(prefix))
        if not all(file.is_file() for file in files):
            raise _nothing(source)
        key = xxhash.xxh3_128_hexdigest("\n".join(map(_version, files)).encode())
        with _copy(source, cache, key) as folder:
            if folder is not None:
                for file in files:
                    get_file(file, folder / file.name)
        return cache / key / prefix.name


def copy_as_it_is(source: Path, folder: Path) -> Path:
    """Copy a dataset with all that is wrong with it, for those who look for that.

    Raises:
        UserError: there is no manifest that can be read.
    """
    manifest = DatasetManifest.read(source)
    _copy_tokenizer(source / manifest.tokenizer.folder, folder / manifest.tokenizer.folder)
    shards = _flat_shards(manifest)
    for record, local in zip(manifest.shards, shards, strict=True):
        remote, near = record.path(source), local.path(folder)
        near.parent.mkdir(exist_ok=True)
        for file in (bin_path, idx_path):
            with full_disk_errors(folder), suppress(FileNotFoundError):
                get_file(file(remote), file(near))
    manifest.model_copy(update={"shards": shards}).save(folder)
    return folder


@contextmanager
def _copy(source: Path, cache: Path, key: str) -> Iterator[Path | None]:
    """A folder to copy into, which becomes CACHE/KEY; None where that is there already."""
    if (cache / key).is_dir():
        yield None
        return
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / f".{key}.lock", "a")  # noqa: SIM115 (held)
    with lock:
        with suppress(OSError):  # some network mounts know no locks: both copy, one renames
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (cache / key).is_dir():
            yield None
            return
        print(f"copying {source} to {cache / key}", file=sys.stderr)
        unfinished = cache / f".{key}.unfinished"
        with disk_errors(cache):
            unfinished.mkdir(exist_ok=True)
        yield unfinished
        sync_tree(unfinished)
        try:
            unfinished.rename(cache / key)
        except OSError:
            if not (cache / key).is_dir():
                raise


def _copy_dataset(source: Path, folder: Path) -> None:
    manifest = DatasetManifest.read(source)
    _copy_tokenizer(source / manifest.tokenizer.folder, folder / manifest.tokenizer.folder)
    shards = _flat_shards(manifest)
    jobs = []
    for record, local in zip(manifest.shards, shards, strict=True):
        remote, near = record.path(source), local.path(folder)
        near.parent.mkdir(exist_ok=True)
        jobs.append((bin_path(remote), bin_path(near), record.bin_bytes, record.bin_xxh3))
        jobs.append((idx_path(remote), idx_path(near), record.idx_bytes, record.idx_xxh3))
    with ThreadPoolExecutor(_COPIES_AT_A_TIME) as pool:
        list(pool.map(lambda job: _copy_checked(*job), jobs))
    manifest.model_copy(update={"shards": shards}).save(folder)


def _copy_checked(remote: Path, near: Path, size: int, xxh3: str) -> None:
    if size_of(near) == size:
        return  # it was renamed after its checksum was found right
    temporary = near.with_name(f".{near.name}.tmp")
    try:
        get_file(remote, temporary)
    except FileNotFoundError as error:
        raise _differs(remote, "is missing") from error
    if (found := file_checksum(temporary)) != xxh3:
        temporary.unlink()
        raise _differs(remote, f"has the checksum {found}, not {xxh3}")
    temporary.rename(near)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Small files; that they are those of the ids is checked when the tokenizer is loaded."""
    folder.mkdir(exist_ok=True)
    with remote_errors(source):
        for path in source.iterdir() if source.is_dir() else ():
            if path.is_file():
                get_file(path, folder / path.name)


def _flat_shards(manifest: DatasetManifest) -> list[ShardRecord]:
    """The records of a copy: shards of other folders lie in `from_0`, `from_1`, ..."""
    folders = list(dict.fromkeys(shard.folder for shard in manifest.shards if shard.folder))
    names = {folder: f"from_{number}" for number, folder in enumerate(folders)}
    return [
        shard.model_copy(update={"folder": names.get(shard.folder, "")})
        for shard in manifest.shards
    ]


def _version(file: Path) -> str:
    """What changes when an object does."""
    info: dict[str, Any] = cast(Any, file).fs.info(cast(Any, file).path)
    marks = [str(info[name]) for name in _VERSION_KEYS if info.get(name) is not None]
    return f"{file} {info.get('size')} {marks[:1]}"


def _differs(remote: Path, what: str) -> UserError:
    return UserError(
        f"{remote} {what}",
        rule="a dataset's files are those that its manifest names",
        remedy="upload the file again, or save what is whole with `python -m data_prep repair`",
    )


def _nothing(source: Path) -> UserError:
    return UserError(
        f"no dataset at {source}",
        rule=f"a dataset is a folder with {MANIFEST_NAME}, or the prefix of a .bin/.idx pair",
        remedy="check the address, or prepare one with `python -m data_prep tokenize`",
    )
