"""Staging folders on the machines' own disks: who shares one, and what all of them hold.

On several machines each has the files of its own ranks only, so that no rank can read a staged
checkpoint; but all together may hold one that was not copied to the run's folder yet.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import xxhash

from megascale.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.storage import Storage
from megascale.errors import UserError


@dataclass(frozen=True)
class Staged:
    """A checkpoint in the staging folders.

    Attributes:
        name: its folder's name.
        holders: file -> the lowest rank that sees it with its right size.
        is_near: whether every rank sees every file.
    """

    name: str
    holders: dict[str, int]
    is_near: bool


def disk_leaders(storage: Storage, ranks: Ranks) -> list[int]:
    """For each rank the lowest one that sees the same folder. Collective.

    Raises:
        UserError: a rank cannot write there.
    """
    if ranks.size == 1:
        return [0]
    mark = f".seen_{ranks.exchange(secrets.token_hex(8))[0]}_"

    def leave_mark() -> None:
        storage.make_folder()
        with storage.open_write(f"{mark}{ranks.rank}") as stream:
            stream.write(b"")

    agree(ranks, leave_mark)
    lowest = next(rank for rank in range(ranks.size) if storage.exists(f"{mark}{rank}"))
    leaders = ranks.exchange(lowest)
    agree(ranks, lambda: storage.remove_file(f"{mark}{ranks.rank}"))
    return leaders


def staged_checkpoints(storage: Storage, names: list[str], ranks: Ranks) -> list[Staged]:
    """The checkpoints of which all machines together hold every file. Collective.

    Args:
        names: of the folders with a manifest that this rank sees.
    """
    seen = agree(ranks, lambda: {name: row for name in names if (row := _look(storage, name))})
    groups: dict[tuple[str, str], dict[int, list[str]]] = defaultdict(dict)
    listed: dict[tuple[str, str], list[str]] = {}
    for rank, rows in enumerate(seen):
        for name, (digest, wanted, there) in rows.items():
            groups[name, digest][rank] = there
            listed[name, digest] = wanted
    found = []
    for (name, digest), by_rank in groups.items():
        holders: dict[str, int] = {}
        for rank, there in sorted(by_rank.items()):
            holders = {**dict.fromkeys(there, rank), **holders}
        wanted = listed[name, digest]
        if set(holders) == set(wanted):
            near = all(len(by_rank.get(rank, ())) == len(wanted) for rank in range(ranks.size))
            found.append(Staged(name, holders, near))
    return found


def _look(storage: Storage, name: str) -> list[Any] | None:
    """[checksum of the manifest, its files, those of them that are here]; None if it is damaged."""
    here = Storage(storage.location(name))
    try:
        manifest = read_manifest(here)
        with here.open_read(MANIFEST_NAME) as stream:
            digest = xxhash.xxh3_128_hexdigest(stream.read())
    except (UserError, OSError):
        return None
    there = [e.path for e in manifest.files if here.exists(e.path) and here.size(e.path) == e.bytes]
    return [digest, [entry.path for entry in manifest.files], there]
