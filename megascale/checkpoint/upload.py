"""Copying a staged checkpoint to where the run keeps its checkpoints, all ranks in parallel."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import IO

import xxhash

from megascale.checkpoint.manifest import MANIFEST_NAME, FileEntry, read_manifest
from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.writer import working_name
from megascale.errors import UserError

_CHUNK = 4 * 1024 * 1024


def upload(
    source: Storage,
    target: Storage,
    name: str,
    ranks: Ranks,
    holders: Mapping[str, int] | None = None,
) -> None:
    """Copy the complete checkpoint `name` from the machines' own disks; collective.

    Each rank copies its files, since no other machine need see them, and rank 0, when all are
    there, the manifest. The bytes are compared with the manifest's checksums on the way.

    Args:
        holders: file -> the rank that copies it; None: the one that wrote it.

    Raises:
        UserError: a file cannot be read, has changed, or cannot be written.
    """
    working = working_name(target, name)
    first = min(holders.values()) if holders else 0

    def read() -> str:
        if ranks.rank != first:
            return ""
        read_manifest(Storage(source.location(name)))
        with source.open_read(name, MANIFEST_NAME) as stream:
            return stream.read().decode()

    def start() -> None:
        if ranks.rank == 0:
            target.remove_file(working, MANIFEST_NAME)
            target.remove_folder(working)
            target.make_folder(working)

    def copy_own() -> None:
        for entry in entries:
            holder = _writer(entry.path) if holders is None else holders[entry.path]
            if holder == ranks.rank:
                _copy(source, target, name, working, entry)

    def commit() -> None:
        if ranks.rank == 0:
            with target.open_write(working, MANIFEST_NAME) as stream:
                stream.write(text.encode())
            if working != name:
                target.commit_folder(working, name)

    try:
        text = agree(ranks, read)[first]
        entries = [FileEntry(**row) for row in json.loads(text)["files"]]
        agree(ranks, start)
        agree(ranks, copy_own)
        agree(ranks, commit)
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(UserError, OSError):
                target.remove_folder(working)
        raise


def _writer(path: str) -> int:
    """The rank that wrote a file: its own, or 0 for the small ones."""
    match = re.fullmatch(r"rank_(\d+)\.safetensors", path)
    return int(match.group(1)) if match else 0


@contextlib.contextmanager
def _reading(source: Storage, name: str, parts: list[str]) -> Iterator[Iterator[bytes]]:
    """The blocks of a staged file; what its disk refuses is told apart from what `target` does."""
    path = source.path(name, *parts)

    def failure(error: OSError) -> UserError:
        return UserError(
            f"cannot read {path}: {error.strerror or error}",
            rule="a staged checkpoint is copied to the run's folder",
            remedy="check the disk of checkpoint.staging_dir",
        )

    def blocks(stream: IO[bytes]) -> Iterator[bytes]:
        while True:
            try:
                block = stream.read(_CHUNK)
            except OSError as error:
                raise failure(error) from error
            if not block:
                return
            yield block

    try:
        opened = source.open_read(name, *parts)
    except OSError as error:
        raise failure(error) from error
    with opened as stream:
        yield blocks(stream)


def _copy(source: Storage, target: Storage, name: str, working: str, entry: FileEntry) -> None:
    parts = entry.path.split("/")
    if len(parts) > 1:
        target.make_folder(working, *parts[:-1])
    digest = xxhash.xxh3_128()
    with (
        _reading(source, name, parts) as blocks,
        target.open_write(working, *parts) as writing,
    ):
        for block in blocks:
            digest.update(block)
            writing.write(block)
    if digest.hexdigest() != entry.xxh3_128:
        raise UserError(
            f"{source.path(name, *parts)} has another checksum than its manifest",
            rule="a staged checkpoint is uploaded only as it was written",
            remedy="check the disk of checkpoint.staging_dir",
        )
