"""Collectives as differentiable functions of plain tensors, for tensor and sequence parallelism.

Each pairs a communication in the forward with its transpose in the backward (arXiv:1909.08053
section 3, arXiv:2205.05198 section 4.2):

    function            forward                     backward
    copy_to_group       nothing                     all-reduce
    reduce_from_group   all-reduce                  nothing
    gather_sequence     all-gather along T          reduce-scatter along T
    scatter_sequence    reduce-scatter along T      all-gather along T
    leave_sequence      all-gather along T          nothing: own part
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE_DIM = 1  # of (B, T, ...)


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T_local, ...) of every rank -> (B, T, ...) in rank order."""
    size = dist.get_world_size(group)
    local = x.transpose(0, SEQUENCE_DIM).contiguous()  # (T_local, B, ...)
    whole = local.new_empty((size * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(whole, local, group=group)
    return whole.transpose(0, SEQUENCE_DIM)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of (B, T, ...) over the ranks, of which this rank keeps its (B, T_local, ...)."""
    size = dist.get_world_size(group)
    whole = x.transpose(0, SEQUENCE_DIM).contiguous()  # (T, B, ...)
    local = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
    dist.reduce_scatter_tensor(local, whole, group=group)
    return local.transpose(0, SEQUENCE_DIM)


def own_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part (B, T_local, ...) of (B, T, ...)."""
    return x.chunk(dist.get_world_size(group), SEQUENCE_DIM)[dist.get_rank(group)]


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, in a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


Exchange = Callable[[Tensor, dist.ProcessGroup], Tensor]


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, there: Exchange, back: Exchange
    ) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def transposed(x: Tensor, group: dist.ProcessGroup, there: Exchange, back: Exchange) -> Tensor:
    """``there(x, group)``, whose gradient is ``back(gradient, group)``."""
    return _Transposed.apply(x, group, there, back)


def _unchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def _own_copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return own_slice(x, group).contiguous()


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity; the gradient is summed over the group. For what is replicated before a cut."""
    return transposed(x, group, _unchanged, all_reduced)


def reduce_from_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' partial results."""
    return transposed(x, group, all_reduced, _unchanged)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T_local, ...) -> (B, T, ...); the ranks' gradients are summed and cut again."""
    return transposed(x, group, all_gather_sequence, reduce_scatter_sequence)


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial results (B, T, ...) -> own part (B, T_local, ...) of their sum."""
    return transposed(x, group, reduce_scatter_sequence, all_gather_sequence)


def leave_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T_local, ...) -> (B, T, ...), in front of what every rank computes alike.

    There each rank's gradient is already the whole one, so nothing is summed on the way back.
    """
    return transposed(x, group, all_gather_sequence, _own_copy)
