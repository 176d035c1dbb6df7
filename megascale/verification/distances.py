"""How far a record's tensors are from another's, and where copies of one tensor differ.

A tensor is read once, with all steps that were kept of it: one pass over few large arrays instead
of many over small ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megascale.verification.record import RunRecord, joined

_AT_ONCE = 1 << 24
"""Elements of a block of rows that are held at once: of large tensors a few rows at a time."""


@dataclass(frozen=True)
class Distances:
    """Of every tensor, by (kind, name), one number a row (see `kept_rows`).

    Attributes:
        l2: root of the sum of squares of the difference.
        largest: largest absolute difference of an element.
        size: l2 of the tensor itself.
        drift: whether ranks that hold the same elements disagree on them in a single bit.
    """

    l2: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    largest: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    size: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    drift: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


def distances(found: RunRecord, expected: RunRecord) -> Distances:
    """Of `found` from `expected`: every gradient and weight of every kept step.

    A tensor or a step of it that no rank of `found` recorded is NaN away.
    """
    out = Distances()
    for kind in ("grad", "master"):
        for name in expected.names:
            rows = [
                _rows(found, expected, kind, name, *part)
                for part in _row_blocks(expected, kind, name)
            ]
            columns = (np.concatenate(column) for column in zip(*rows, strict=True))
            tables = (out.l2, out.largest, out.size, out.drift)
            for table, column in zip(tables, columns, strict=True):
                table[kind, name] = column
    return out


def _row_blocks(expected: RunRecord, kind: str, name: str) -> list[tuple[int, int]]:
    """Half-open intervals of rows that are small enough to be held at once."""
    count = len(expected.rows(kind))
    elements = next(part.numel for _, part, _ in expected.blocks(kind, name, 0, 1))
    step = max(1, _AT_ONCE // max(1, elements))
    return [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def _rows(
    found: RunRecord, expected: RunRecord, kind: str, name: str, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """l2, largest, size and drift of some rows of a tensor."""
    blocks = list(found.blocks(kind, name, first, last))
    theirs = joined(expected.blocks(kind, name, first, last))
    assert theirs is not None, f"the single process recorded no {kind} of {name}"
    ours = joined(blocks)
    away = np.full_like(theirs, np.nan) if ours is None else ours - theirs
    drift = np.zeros(last - first, dtype=bool)
    seen: dict[tuple, np.ndarray] = {}
    for _, part, values in blocks:
        same = seen.setdefault((part.box, part.start, part.numel), values)
        if same is not values:
            drift |= (same != values).any(axis=1)  # NaN differs from itself
    return _l2(away), np.abs(away).max(axis=1, initial=0.0), _l2(theirs), drift


def _l2(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(rows).sum(axis=1))
