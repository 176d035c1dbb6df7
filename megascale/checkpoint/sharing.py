"""Who holds what: fragments that several ranks have alike are written, and read, by one of them.

Two ranks hold the same data when their fragments cover the same range of the same parameter: data-
parallel copies without ZeRO, tensor-parallel copies of norms, the tied weight of two pipeline
stages. Each such fragment is given to the holder that has the least to do so far, so that all ranks
write in parallel and no byte is written or read twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import xxhash

from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.reader import CheckpointReader
from megascale.parallel.fragment import Fragment


def place(fragment: Fragment) -> str:
    """16 hex digits that are the same for fragments that cover the same elements."""
    return _place(fragment.kind, fragment.name, fragment.box, fragment.start, fragment.numel)


@lru_cache(maxsize=1 << 16)  # a run saves the same places again and again
def _place(*words: Any) -> str:
    return xxhash.xxh3_64_hexdigest(repr(words).encode())


class Shares:
    """Which rank writes what; worked out anew only where that of some rank has changed."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._chosen: dict[str, int] = {}

    def own(
        self, owned: Sequence[Fragment], replicas: Sequence[Fragment], ranks: Ranks
    ) -> list[Fragment]:
        """The fragments that this rank writes: each element of the run on one rank. Collective.

        Args:
            owned: fragments such that each element is on one rank.
            replicas: all that this rank holds. One that covers the very range of an owned fragment
                of another rank may be written here instead; others are left out.
        """
        mine = {place(fragment): fragment for fragment in (*replicas, *owned)}
        owners = {place(fragment) for fragment in owned}
        rows = [[key, fragment.numel, key in owners] for key, fragment in mine.items()]
        digests = ranks.exchange(xxhash.xxh3_128_hexdigest(repr(rows).encode()))
        if digests != self._digests:  # the same on all ranks
            everyone = ranks.exchange(rows)
            wanted = {key for rows in everyone for key, _, is_owned in rows if is_owned}
            self._chosen = _balanced(*_holders(everyone, wanted), ranks.size)
            self._digests = digests
        chosen = self._chosen
        return [fragment for key, fragment in mine.items() if chosen.get(key) == ranks.rank]


def fill_all(reader: CheckpointReader, fragments: Sequence[Fragment], ranks: Ranks) -> None:
    """Fill every rank's fragments; data that several ranks hold is read by one. Collective.

    No rank holds more than its own fragments, and one of them twice where it is on a GPU.

    Raises:
        UserError: some element is in no piece; on all ranks alike.
    """
    mine = {place(fragment): fragment for fragment in fragments}
    everyone = ranks.exchange([[key, fragment.numel] for key, fragment in mine.items()])
    holders, sizes = _holders(everyone, None)
    chosen = _balanced(holders, sizes, ranks.size)

    def read() -> None:
        for key, fragment in mine.items():
            if chosen[key] == ranks.rank:
                reader.fill(fragment)

    agree(ranks, read)
    # the same order on every rank, else two ranks could wait for each other
    for key in sorted(key for key, several in holders.items() if len(several) > 1):
        ranks.share(mine[key].tensor if key in mine else None, chosen[key], holders[key])


def _holders(
    everyone: Iterable[Iterable[Sequence[Any]]], wanted: set[str] | None
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Which ranks hold each place, and its number of elements."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for rank, rows in enumerate(everyone):
        for key, numel, *_ in rows:
            if wanted is None or key in wanted:
                holders[key].append(rank)
                sizes[key] = numel
    return holders, sizes


def _balanced(holders: dict[str, list[int]], sizes: dict[str, int], size: int) -> dict[str, int]:
    """Largest first, each to the least loaded of its holders; what one rank holds is its own."""
    load = [0] * size
    chosen: dict[str, int] = {}
    for key, ranks in holders.items():
        if len(ranks) == 1:
            chosen[key] = ranks[0]
            load[ranks[0]] += sizes[key]
    several = [key for key, ranks in holders.items() if len(ranks) > 1]
    for key in sorted(several, key=lambda key: (-sizes[key], key)):
        chosen[key] = min(holders[key], key=lambda rank: (load[rank], rank))
        load[chosen[key]] += sizes[key]
    return chosen
