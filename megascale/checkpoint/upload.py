"""Copying a staged checkpoint to where the run keeps its checkpoints, all ranks in parallel."""

from __future__ import annotations

import contextlib

import xxhash

from megascale.checkpoint.manifest import MANIFEST_NAME, FileEntry, read_manifest
from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.storage import WRITING_PREFIX, Storage
from megascale.errors import UserError

_CHUNK = 4 * 1024 * 1024


def upload(source: Storage, target: Storage, name: str, ranks: Ranks) -> None:
    """Copy the complete checkpoint `name` from a node's own disk; collective.

    Each rank copies the file that it wrote, since no other machine need see it, and rank 0 the
    small files and, when all are there, the manifest. The bytes are compared with the manifest's
    checksums on the way.

    Raises:
        UserError: a file cannot be read, has changed, or cannot be written.
    """
    working = f"{WRITING_PREFIX}{name}" if target.is_local else name

    def copy_own() -> None:
        ours = f"rank_{ranks.rank:05d}.safetensors"
        for entry in entries:
            is_rank_file = entry.path.startswith("rank_")
            if entry.path == ours or (ranks.rank == 0 and not is_rank_file):
                _copy(source, target, name, working, entry)

    def start() -> list[dict[str, object]]:
        if ranks.rank:
            return []
        target.remove_file(working, MANIFEST_NAME)
        target.remove_folder(working)
        target.make_folder(working)
        manifest = read_manifest(Storage(source.location(name)))
        return [entry.model_dump() for entry in manifest.files]

    def commit() -> None:
        if ranks.rank == 0:
            with source.open_read(name, MANIFEST_NAME) as stream:
                text = stream.read()
            with target.open_write(working, MANIFEST_NAME) as stream:
                stream.write(text)
            if working != name:
                target.commit_folder(working, name)

    try:
        entries = [FileEntry(**row) for row in agree(ranks, start)[0]]
        agree(ranks, copy_own)
        agree(ranks, commit)
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(UserError, OSError):
                target.remove_folder(working)
        raise


def _copy(source: Storage, target: Storage, name: str, working: str, entry: FileEntry) -> None:
    parts = entry.path.split("/")
    if len(parts) > 1:
        target.make_folder(working, *parts[:-1])
    digest = xxhash.xxh3_128()
    with (
        source.open_read(name, *parts) as reading,
        target.open_write(working, *parts) as writing,
    ):
        while block := reading.read(_CHUNK):
            digest.update(block)
            writing.write(block)
    if digest.hexdigest() != entry.xxh3_128:
        raise UserError(
            f"{source.path(name, *parts)} has another checksum than its manifest",
            rule="a staged checkpoint is uploaded only as it was written",
            remedy="check the disk of checkpoint.staging_dir",
        )
