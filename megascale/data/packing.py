"""Which documents, or pieces of them, a sample is made of, where samples are no plain windows.

    best_fit      documents stay whole where they fit: best-fit decreasing bin packing
                  (arXiv:2404.10830), in groups of 1,048,576 documents. A document with more
                  targets than a sample holds gives full samples, and its rest is packed.
    one_document  one document a sample, padded or truncated.

A sample has T + 1 places: tokens 0 .. T - 1 are inputs, 1 .. T labels. A document of n tokens has
n - 1 targets; one with fewer than two tokens has none and is left out. What is made is a function
of the documents' lengths and T: no seed, the same in every epoch and on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megascale.data.corpus import TokenCorpus
from megascale.errors import UserError

Packing = Literal["best_fit", "one_document"]
_GROUP = 1 << 20  # documents: bounds memory, and keeps a sample's documents near each other


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a part of a corpus.

    Attributes:
        samples: made. documents: of the part, empty ones included.
        without_target: documents of fewer than two tokens, left out.
        truncated: documents whose end is left out. tokens_left_out: in those ends.
        padding: share of the samples' input positions that hold no token.
    """

    samples: int
    documents: int
    without_target: int
    truncated: int
    tokens_left_out: int
    padding: float

    def __str__(self) -> str:
        text = f"{self.samples:,} samples of {self.documents:,} documents"
        if self.truncated:
            text += f", {self.truncated:,} truncated by {self.tokens_left_out:,} tokens"
        if self.without_target:
            text += f", {self.without_target:,} of fewer than 2 tokens left out"
        return f"{text}, {self.padding:.2%} padding"


class Packs:
    """The samples of one part of a corpus by number: pieces of its token stream.

    The first samples are the full pieces of long documents, found by arithmetic; the others are
    stored as one start and length a piece.

    Attributes:
        seq_length: T.
        lengths: (samples,) int32, inputs that hold a token, at most T.
        report: what was made.
    """

    def __init__(
        self, corpus: TokenCorpus, token_range: tuple[int, int], seq_length: int, packing: Packing
    ) -> None:
        starts, sizes = documents_of(corpus, token_range)
        self.seq_length = seq_length
        capacity = seq_length + 1
        # as many targets as a sample has, or more; few documents, so the rest is done to these only
        long = np.flatnonzero(sizes > seq_length) if packing == "best_fit" else np.zeros(0, int)
        full = (sizes[long] - 1) // seq_length
        self._long_starts, self._long_ends = starts[long], np.cumsum(full)
        pieces, places = starts.copy(), sizes.astype(np.int32)
        pieces[long] += full * seq_length
        places[long] -= (full * seq_length).astype(np.int32)
        kept = places >= 2
        if not kept.all():
            pieces, places = pieces[kept], places[kept]
        if packing == "best_fit":
            self._starts, self._sizes, self._firsts = _packed(pieces, places, capacity)
        else:
            self._starts, self._sizes = pieces, np.minimum(places, capacity)
            self._firsts = np.arange(len(pieces) + 1)
        self.lengths = self._lengths()
        if not len(self.lengths):
            raise UserError(
                f"tokens {token_range[0]}..{token_range[1]} of {corpus.path} have no document "
                "with two tokens",
                rule="a document gives a sample when it has a token to predict from the one before",
                remedy="give this part of the split a larger fraction, or prepare longer documents",
            )
        cut = np.maximum(sizes - capacity, 0) if packing == "one_document" else np.zeros(1, int)
        self.report = PackingReport(
            samples=len(self.lengths),
            documents=len(sizes),
            without_target=int((sizes < 2).sum()),
            truncated=int(np.count_nonzero(cut)),
            tokens_left_out=int(cut.sum()),
            padding=1 - int(self.lengths.sum(dtype=np.int64)) / (len(self.lengths) * seq_length),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def spans(self, number: int) -> list[tuple[int, int]]:
        """(start, length) in the token stream of each piece of a sample, in order."""
        full = int(self._long_ends[-1]) if len(self._long_ends) else 0
        if number < full:
            document = int(np.searchsorted(self._long_ends, number, side="right"))
            before = int(self._long_ends[document - 1]) if document else 0
            start = int(self._long_starts[document]) + (number - before) * self.seq_length
            return [(start, self.seq_length + 1)]
        first, last = self._firsts[number - full : number - full + 2].tolist()
        starts, sizes = self._starts[first:last].tolist(), self._sizes[first:last].tolist()
        return list(zip(starts, sizes, strict=True))

    def _lengths(self) -> np.ndarray:
        full = int(self._long_ends[-1]) if len(self._long_ends) else 0
        lengths = np.full(full + len(self._firsts) - 1, self.seq_length, dtype=np.int32)
        if len(self._sizes):
            # a sample has seq_length + 1 places, so sums stay in 32 bits
            sums = np.add.reduceat(self._sizes, self._firsts[:-1], dtype=np.int32)
            np.minimum(sums, self.seq_length, out=lengths[full:])
        return lengths


def documents_of(
    corpus: TokenCorpus, token_range: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of the documents of a part, int64, empty ones included."""
    start, stop = token_range
    starts = corpus.boundaries(start, stop - start)
    if not len(starts) or starts[0] != start:
        starts = np.append(start, starts)
    sizes = np.empty(len(starts), dtype=np.int64)
    np.subtract(starts[1:], starts[:-1], out=sizes[:-1])
    sizes[-1] = stop - starts[-1]
    return starts, sizes


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put items into bins: the largest first, each where the least room stays.

    Items of one size are placed together: a bin of room r takes r // size of them, as one by one
    they would go, since after each the same bin has the least room that suffices. So the work is
    in the number of different sizes and rooms, and in numpy for the items.

    Args:
        sizes: (N,) integers in 1 .. capacity.

    Returns:
        (bins, count): bins (N,) int32, the bin of each item; their number.
    """
    bins = np.empty(len(sizes), dtype=np.int32)
    narrow = np.uint16 if capacity < 1 << 16 else np.int64  # numpy sorts 16 bits by radix
    order = np.argsort((capacity - sizes).astype(narrow), kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    rooms: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by what they have left
    occupied = np.zeros(capacity + 1, dtype=bool)
    made = done = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        items = order[done : done + int(counts[size])]
        done += len(items)
        wide = occupied[size:]
        while len(items) and wide[first := int(wide.argmax())]:
            room = size + first
            each = room // size
            found = rooms[room][0] if len(rooms[room]) == 1 else np.concatenate(rooms[room])
            used = min(len(found), -(-len(items) // each))
            rooms[room] = [found[used:]] if used < len(found) else []
            occupied[room] = bool(rooms[room])
            items = _place(bins, items, found[:used], each, size, room, rooms, occupied)
        if len(items):
            count = -(-len(items) // (capacity // size))
            new = np.arange(made, made + count, dtype=np.int32)
            made += len(new)
            _place(bins, items, new, capacity // size, size, capacity, rooms, occupied)
    return bins, made


def _place(
    bins: np.ndarray,
    items: np.ndarray,
    into: np.ndarray,
    each: int,
    size: int,
    room: int,
    rooms: list[list[np.ndarray]],
    occupied: np.ndarray,
) -> np.ndarray:
    """Put `each` items into every bin of `into` (the last may get fewer); the items left over."""
    taken = min(len(items), len(into) * each)
    bins[items[:taken]] = into if each == 1 else np.repeat(into, each)[:taken]
    whole = taken // each
    rooms_left = (room - each * size, room - taken % each * size)
    for part, left in zip((into[:whole], into[whole:]), rooms_left, strict=True):
        if len(part) and left:
            rooms[left].append(part)
            occupied[left] = True
    return items[taken:]


def _packed(
    starts: np.ndarray, sizes: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces in the order of their bins, and (bins + 1,) where each bin's pieces begin."""
    counts = [np.zeros(1, dtype=np.int64)]
    packed_starts, packed_sizes = np.empty_like(starts), np.empty(len(sizes), dtype=np.int32)
    for begin in range(0, len(sizes), _GROUP):
        group = slice(begin, begin + _GROUP)
        bins, made = best_fit_decreasing(sizes[group], capacity)
        order = _stable_order(bins, made)
        packed_starts[group] = starts[group][order]
        packed_sizes[group] = sizes[group][order]
        counts.append(np.bincount(bins, minlength=made))
    return packed_starts, packed_sizes, np.cumsum(np.concatenate(counts))


def _stable_order(values: np.ndarray, limit: int) -> np.ndarray:
    """np.argsort(values, kind="stable") of integers in 0 .. limit - 1, limit at most 2^32.

    By the lower 16 bits and then the upper ones, each by numpy's radix sort: it has none for wider
    integers, where it takes three times as long.
    """
    order = np.argsort(values.astype(np.uint16), kind="stable")
    if limit <= 1 << 16:
        return order
    upper = (values >> 16).astype(np.uint8 if limit <= 1 << 24 else np.uint16)
    return order[np.argsort(upper[order], kind="stable")]
