"""Which checkpoints of a run may go."""

from __future__ import annotations

from collections.abc import Iterable


def steps_to_remove(
    steps: Iterable[int],
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep: Iterable[int] = (),
) -> list[int]:
    """The steps that no rule keeps, ascending; the newest is always kept.

    Args:
        steps: of the complete checkpoints.
        keep_last: this many of the newest stay; None: all stay.
        keep_every: multiples of it stay.
        keep: steps that stay (the best one).
    """
    ordered = sorted(set(steps))
    if keep_last is None:
        return []
    kept = {*ordered[-max(keep_last, 1) :], *keep}
    if keep_every:
        kept |= {step for step in ordered if step % keep_every == 0}
    return [step for step in ordered if step not in kept]
