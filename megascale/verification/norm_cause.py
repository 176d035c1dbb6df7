"""Which part of the gradient is missing in a wrong norm, or counted twice.

A norm is the root of a sum of squares, so the difference of two squared norms is the sum of squares
of what one of them left out or counted once too often.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megascale.verification.layout import Layout
from megascale.verification.record import Part, RunRecord, joined

_CLOSE = 1e-3
"""Relative agreement of two sums of squares that counts as the same."""


def norm_cause(found: RunRecord, expected: RunRecord, step: int, layout: Layout) -> str:
    """What explains a wrong norm of right gradients; "" when nothing does."""
    if not expected.has_tensors(step):
        return ""
    difference = found.norms[step] ** 2 - expected.norms[step] ** 2
    word = "counted twice" if difference > 0 else "missing"
    for name, squares in _parts(found, expected, step, layout):
        if squares > 0 and abs(abs(difference) / squares - 1) < _CLOSE:
            return f"the squares of {name} are {word} in the norm"
    for axes, squares in _without_axes(found, expected, step, layout):
        if abs(found.norms[step] ** 2 / max(squares, 1e-300) - 1) < _CLOSE:
            return f"the sum over the {axes} ranks is missing in the norm"
    return ""


def _without_axes(
    found: RunRecord, expected: RunRecord, step: int, layout: Layout
) -> Iterator[tuple[str, float]]:
    """(axes, what rank 0 gets when it does not sum over them)."""
    shape = (layout.pp, layout.dp, layout.cp, layout.tp)
    grid = np.arange(layout.world_size).reshape(shape)
    for axes, numbers in (("tp", (3,)), ("dp", (1,)), ("cp", (2,)), ("dp x cp", (1, 2))):
        if all(shape[axis] > 1 for axis in numbers):
            index = tuple(0 if axis in numbers else slice(None) for axis in range(4))
            ranks = set(np.ravel(grid[index]).tolist())
            yield axes, sum(_squares(found, step, name, ranks) for name in expected.names)


def _squares(found: RunRecord, step: int, name: str, ranks: set[int]) -> float:
    """Sum of squares of the elements of a gradient that some of `ranks` hold."""
    row = found.rows("grad").index(step)
    blocks = found.blocks("grad", name, row, row + 1)
    whole = joined(block for block in blocks if block[0] in ranks)
    return 0.0 if whole is None else float(np.nansum(np.square(whole)))


def _parts(
    found: RunRecord, expected: RunRecord, step: int, layout: Layout
) -> Iterator[tuple[str, float]]:
    """(name, sum of squares) of what a reduction may lose: axes of ranks first, then tensors."""
    squares = {
        name: float(np.square(expected.whole(step, "grad", name)).sum()) for name in expected.names
    }
    for stage, names in enumerate(_names_by_stage(found, layout)):
        yield f"pipeline rank {stage}'s gradients", sum(squares[name] for name in names)
        if layout.pp > 2:
            others = sum(squares[name] for name in set(squares) - names)
            yield f"all gradients but pipeline rank {stage}'s", others
    if layout.tp > 1:
        copied = {part.name for part in found.ranks[0].values() if _is_whole(part)}
        each = (layout.tp - 1) * sum(squares[name] for name in copied)
        yield f"what all {layout.tp} tensor-parallel ranks hold whole, by each of them,", each
    yield from squares.items()


def _is_whole(part: Part) -> bool:
    return all(interval == (0, n) for interval, n in zip(part.box, part.global_shape, strict=True))


def _names_by_stage(found: RunRecord, layout: Layout) -> list[set[str]]:
    """The tensors that each pipeline rank holds; a tied weight counts for the first that does."""
    if layout.pp == 1:
        return []
    per_stage = layout.world_size // layout.pp  # pp is the outermost axis
    held: list[set[str]] = []
    for first in range(0, layout.world_size, per_stage):
        ranks = found.ranks[first : first + per_stage]
        keys = [key for parts in ranks for key in parts]
        names = {name for kind, name in keys if kind == "grad"}
        held.append(names - set().union(*held))
    return held
