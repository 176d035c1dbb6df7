"""How parameters of ours lie in one tensor of theirs: merged for export, split for import.

Each layout is a pair of functions that undo each other. `heads` is the number of query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One way of storing.

    Attributes:
        merge: (our tensors, heads) -> their tensor.
        split: (their tensor, our shapes, heads) -> our tensors.
        is_plain: one tensor of ours is one of theirs, element for element in the same order.
    """

    merge: Callable[[Sequence[Tensor], int], Tensor]
    split: Callable[[Tensor, Sequence[Shape], int], list[Tensor]]
    is_plain: bool = False

    def shape(self, shapes: Sequence[Shape], heads: int) -> Shape:
        """Shape of their tensor for parameters of ours of these shapes."""
        return tuple(self.merge([torch.empty(s, device="meta") for s in shapes], heads).shape)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def _cut(tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    return list(tensor.split([shape[0] for shape in shapes]))


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    """(H * K, ...) -> (H, K, ...)."""
    return tensor.reshape(heads, -1, *tensor.shape[1:])


def _interleave(parts: Sequence[Tensor], heads: int) -> Tensor:
    stacked = torch.stack([_per_head(part, heads) for part in parts], dim=1)  # (H, 3, K, ...)
    return stacked.flatten(0, 2)


def _deinterleave(tensor: Tensor, shapes: Sequence[Shape], heads: int) -> list[Tensor]:
    stacked = tensor.reshape(heads, len(shapes), -1, *tensor.shape[1:])  # (H, 3, K, ...)
    return [stacked[:, i].reshape(shape) for i, shape in enumerate(shapes)]


PLAIN = Layout(lambda parts, heads: parts[0], lambda tensor, shapes, heads: [tensor], True)
"""The same tensor under another name."""

TRANSPOSED = Layout(
    lambda parts, heads: _transposed(parts[0]),
    lambda tensor, shapes, heads: [_transposed(tensor)],
)
"""Matrices as (in, out), GPT-2's Conv1D; vectors as they are."""

JOINED = Layout(
    lambda parts, heads: torch.cat(list(parts)),
    lambda tensor, shapes, heads: _cut(tensor, shapes),
)
"""One after the other along dim 0."""

JOINED_TRANSPOSED = Layout(
    lambda parts, heads: _transposed(torch.cat(list(parts))),
    lambda tensor, shapes, heads: _cut(_transposed(tensor), shapes),
)
"""Joined, then transposed: GPT-2's c_attn."""

INTERLEAVED_HEADS = Layout(_interleave, _deinterleave)
"""Query, key and value of the first head, then those of the second one, ...: GPT-NeoX."""
