"""What differs between two checkpoints, whatever layouts wrote them; block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch

from megascale.checkpoint.name_lists import folded
from megascale.checkpoint.reader import CheckpointReader


def differences(one: CheckpointReader, other: CheckpointReader) -> Iterator[str]:
    """One line for each difference: parameters, shapes, kinds, values, state.

    Values are compared by bits; the line tells the largest difference and how many differ.
    """
    ours, theirs = one.manifest, other.manifest
    names = [name for name in ours.parameters if name in theirs.parameters]
    yield from folded(f"only in the first: {n}" for n in ours.parameters if n not in names)
    yield from folded(f"only in the second: {n}" for n in theirs.parameters if n not in names)
    for name in names:
        shapes = ours.parameters[name], theirs.parameters[name]
        if shapes[0] != shapes[1]:
            yield f"{name}: shape {list(shapes[0])} and {list(shapes[1])}"
            continue
        for kind in dict.fromkeys((*ours.kinds, *theirs.kinds)):
            line = _compare(one, other, name, kind)
            if line:
                yield f"{kind} of {name}: {line}"
    if ours.step != theirs.step:
        yield f"step: {ours.step} and {theirs.step}"
    for key in sorted({*ours.state, *theirs.state}):
        values = [json.dumps(m.state.get(key), sort_keys=True) for m in (ours, theirs)]
        if values[0] != values[1]:
            yield f"state {key}: {values[0]} and {values[1]}"


def _compare(one: CheckpointReader, other: CheckpointReader, name: str, kind: str) -> str:
    shapes = [reader.state_shape(name, kind) for reader in (one, other)]
    if shapes[0] != shapes[1]:
        return f"shape {shapes[0]} and {shapes[1]}"
    differing, largest = 0, 0.0
    for ours, theirs in zip(one.blocks(name, kind), other.blocks(name, kind), strict=True):
        unequal = ours.view(torch.int32) != theirs.view(torch.int32)
        differing += int(unequal.sum())
        largest = max(largest, _largest((ours - theirs)[unequal]))
    if not differing:
        return ""
    return f"{differing} of {math.prod(shapes[0] or ())} elements differ, by at most {largest:.3g}"


def _largest(values: torch.Tensor) -> float:
    """Largest magnitude; infinite where one is not a number."""
    magnitudes = values.abs().nan_to_num(nan=math.inf)
    return float(magnitudes.max()) if len(magnitudes) else 0.0
