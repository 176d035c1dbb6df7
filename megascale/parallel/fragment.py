"""A fragment: the part of one parameter's state that a rank owns, described without its engine.

Both engines, every ZeRO stage and every tensor-parallel cut can be written as

    global tensor --box--> tensor-parallel local tensor --flatten, [start, start + numel)--> part

so a checkpoint that stores fragments knows nothing about the layout that wrote it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

Box = tuple[tuple[int, int], ...]


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor of `shape` entirely."""
    return tuple((0, size) for size in shape)


@dataclass(frozen=True)
class Fragment:
    """A flat range of one (tensor-parallel local) tensor.

    Attributes:
        name: the parameter's global name.
        kind: "master" (fp32 weight), "grad", or an optimizer state's key ("exp_avg", ...).
        global_shape: shape of the whole tensor over all ranks.
        box: the half-open interval of each dimension that the tensor-parallel local tensor covers.
            A state that is reduced over a dimension (Adafactor's row means) lies at index 0 of it.
        start: first element within the flattened local tensor.
        tensor: 1-D live view of the data; writing to it writes the engine's state.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    tensor: torch.Tensor

    @property
    def numel(self) -> int:
        """Number of elements in this fragment."""
        return self.tensor.numel()


def global_runs(
    global_shape: tuple[int, ...], box: Box, start: int, numel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Express a fragment as runs that are contiguous in the flattened *global* tensor.

    Args:
        global_shape: shape of the global tensor.
        box: half-open interval per dimension.
        start, numel: flat range inside the box's own row-major order.

    Returns:
        (global start of each run, length of each run), int64, in the fragment's order.
    """
    if numel == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    extents = [stop - begin for begin, stop in box]
    # A run spans all trailing dimensions that the box covers fully, and one partly covered one.
    dim = len(global_shape)
    run = 1
    while dim > 0:
        dim -= 1
        run *= extents[dim]
        if extents[dim] != global_shape[dim]:
            break
    run = max(run, 1)
    first, last = start // run, (start + numel - 1) // run
    rows = np.arange(first, last + 1, dtype=np.int64)
    begins = _box_row_offsets(rows, global_shape, box, dim)
    lengths = np.full(rows.shape, run, dtype=np.int64)
    head = start - first * run
    begins[0] += head
    lengths[0] -= head
    lengths[-1] -= (last + 1) * run - (start + numel)
    return begins, lengths


def _box_row_offsets(
    rows: np.ndarray, global_shape: tuple[int, ...], box: Box, dim: int
) -> np.ndarray:
    """Global flat offset at which each run (numbered row-major over dims before `dim`) begins."""
    strides = [math.prod(global_shape[axis + 1 :]) for axis in range(len(global_shape))]
    offset = np.zeros(rows.shape, dtype=np.int64)
    if global_shape:
        offset += box[dim][0] * strides[dim]
    rest = rows
    for axis in range(dim - 1, -1, -1):
        extent = box[axis][1] - box[axis][0]
        offset += (rest % extent + box[axis][0]) * strides[axis]
        rest = rest // extent
    # Trailing, fully covered dimensions begin at 0; partly covered ones are handled by box[dim].
    return offset
