"""What is wrong with an update whose gradient was right: on which ranks, and by which factor."""

from __future__ import annotations

import numpy as np

from megascale.verification.record import RunRecord, places

_SAME_SHAPE = 1e-2
"""An update counts as a multiple of the right one when no more than this part of it is left."""


def update_cause(found: RunRecord, expected: RunRecord, step: int, tensor: str) -> str:
    """The factor of each rank's update of a tensor, where there is one; "" when none fits."""
    rows = expected.rows("master")
    now = rows.index(step)
    before = expected.whole(rows[now - 1], "master", tensor)
    right = expected.whole(step, "master", tensor) - before
    factors: dict[int, float] = {}
    for rank, part, values in found.blocks("master", tensor, now - 1, now + 1):
        factor = _factor(values[1] - values[0], right[places(part)])
        if factor is None:
            return ""
        factors[rank] = factor
    different = {rank: factor for rank, factor in factors.items() if abs(factor - 1) > 1e-3}
    if not different:
        return ""
    shown = ", ".join(f"rank {rank} x {factor:.4g}" for rank, factor in different.items())
    return (
        f"the gradient is right and the update is not: {shown}: a learning rate, a weight decay or "
        "a norm in the clipping of its own"
    )


def _factor(ours: np.ndarray, right: np.ndarray) -> float | None:
    """c with ours = c * right, None when there is no such number."""
    square = float(right @ right)
    if not square or not np.isfinite(ours).all():
        return None
    factor = float(ours @ right) / square
    left = np.linalg.norm(ours - factor * right)
    return factor if left <= _SAME_SHAPE * float(np.linalg.norm(ours)) else None
