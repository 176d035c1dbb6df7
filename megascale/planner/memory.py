"""Bytes of parameters, optimizer states and gradients that one rank holds.

With N parameters of a rank's model part, d data-parallel ranks, e bytes a weight and k states of
the optimizer (arXiv:1910.02054, figure 1; Adam has k = 2):

    engine, stage       weights      masters           states    gradients after the backward
    torch 0             e N          4 N (if e < 4)    4 k N     4 N (one fp32 buffer)
    torch 1, 2, 3       4 N/d        the weights       4 k N/d   4 N/d
    deepspeed 1, 2      e N          4 N/d             4 k N/d   4 N/d, and what lies on a border
    deepspeed 3         e (N/d + P)  4 N/d             4 k N/d   e N/d, and a buffer of e N/32

P are the parameters that DeepSpeed keeps whole because they are small; its buffer has the bounds of
`engine.buckets`. The torch engine's shards
are fp32 at every precision: what is gathered is rounded on the way. With e = 8 (fp64, torch only)
every 4 is an 8. The functions below add each
engine's own padding, so that they are exact to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megascale.engine.buckets import reduce_bucket

FP32 = 4
Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateBytes:
    """What one rank holds after a step, in bytes.

    Attributes:
        weights, masters, states: as in `verification.storages.LiveBytes`.
        gradients: the most that gradients and their buffers take before the update.
        padding: weights, masters and states may each be so much larger.
    """

    weights: int
    masters: int
    states: int
    gradients: int
    padding: int = 0


def state_bytes(
    shapes: Sequence[Shape],
    *,
    engine: Literal["torch", "deepspeed"],
    stage: int,
    weight_bytes: int,
    dp_size: int,
    dp_rank: int = 0,
    num_states: int = 2,
    kept_whole: int = 0,
) -> StateBytes:
    """The bytes of one rank.

    Args:
        shapes: of the rank's (tensor-parallel local) parameters.
        weight_bytes: e, of the type that the model computes in.
        dp_rank: which of the ranks; the last ones may hold less.
        num_states: k.
        kept_whole: parameters of at most so many elements stay gathered in DeepSpeed's stage 3.
    """
    total = sum(map(math.prod, shapes))
    wide = max(FP32, weight_bytes)
    if stage == 0:
        masters = 0 if weight_bytes == wide else wide * total
        return StateBytes(
            weight_bytes * total, masters, wide * num_states * total, gradients=wide * total
        )
    if engine == "torch":
        held = wide * sum(-(-shape[0] // dp_size) * math.prod(shape[1:]) for shape in shapes)
        own = sum(_rows(shape[0], dp_size, dp_rank) * math.prod(shape[1:]) for shape in shapes)
        return StateBytes(held, 0, wide * num_states * own, gradients=held)
    if stage < 3:
        part = -(-total // dp_size)
        # two groups of parameters, each aligned to 2 elements a rank
        padding = 2 * 2 * dp_size * max(weight_bytes, FP32 * num_states)
        border = FP32 * max(map(math.prod, shapes))
        return StateBytes(
            weight_bytes * total,
            FP32 * (total // dp_size),
            FP32 * num_states * (total // dp_size),
            gradients=FP32 * part + border + padding,
            padding=padding,
        )
    sizes = [-(-math.prod(shape) // dp_size) for shape in shapes]
    whole = sum(
        size * dp_size
        for size, shape in zip(sizes, shapes, strict=True)
        if math.prod(shape) <= kept_whole
    )
    part = sum(sizes)
    bucket = reduce_bucket(total)
    return StateBytes(
        weight_bytes * (part + whole),
        FP32 * part,
        FP32 * num_states * part,
        gradients=weight_bytes * (part + bucket),
    )


def _rows(rows: int, size: int, rank: int) -> int:
    """Rows of `rank` when `rows` are cut in parts of equal size, the last ones smaller or empty."""
    part = -(-rows // size)
    return max(0, min(part, rows - rank * part))
