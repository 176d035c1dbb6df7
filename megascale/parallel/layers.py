"""Megatron-style layers on plain local tensors; each receives its group.

How a product Y = X A is cut over n ranks (arXiv:1909.08053, section 3):

    column:  A = [A_1 | ... | A_n]      X whole on every rank, Y_i = X A_i
    row:     A = [A_1; ...; A_n]        X_i as the column cut made it, Y = sum_i X_i A_i

A column-parallel layer followed by a row-parallel one costs one all-reduce in the forward and
one in the backward. With sequence parallelism (arXiv:2205.05198) what lies between such pairs is
cut along T: the all-reduce becomes an all-gather before and a reduce-scatter after the pair.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from megascale.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    own_slice,
    reduce_from_group,
    scatter_sequence,
)


class _ColumnLinear(torch.autograd.Function):
    """X A_i with the backward's communication beside the weight's gradient.

    forward:   [all-gather X along T]  ->  Y_i = X A_i
    backward:  dX = dY_i A_i^T  --all-reduce [reduce-scatter] starts-->  dA_i = X^T dY_i  --wait
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, sequence: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the local part only; gathered again in the backward
        ctx.group, ctx.sequence = group, sequence
        whole = all_gather_sequence(x, group) if sequence else x
        return F.linear(whole, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        group = ctx.group
        grad_x = grad @ weight
        if ctx.sequence:
            # X is needed again: fetched while nothing else uses the network
            whole = all_gather_sequence(x, group)
            size = dist.get_world_size(group)
            source = grad_x.transpose(0, 1).contiguous()  # (T, B, D)
            target = source.new_empty((source.shape[0] // size, *source.shape[1:]))
            work = dist.reduce_scatter_tensor(target, source, group=group, async_op=True)
        else:
            whole = x
            target = grad_x.contiguous()
            work = dist.all_reduce(target, group=group, async_op=True)
        grad_weight = grad.flatten(0, -2).t() @ whole.flatten(0, -2)
        work.wait()
        return (target.transpose(0, 1) if ctx.sequence else target), grad_weight, None, None


class ColumnParallelLinear(nn.Module):
    """nn.Linear cut along its outputs.

    Args:
        linear: the whole layer (may be on the meta device); its parameters are replaced by local
            ones of the same names.
        rows: outputs that this rank keeps, half-open.
        sequence: whether the input is cut along T.
    """

    def __init__(
        self, linear: nn.Linear, rows: tuple[int, int], group: dist.ProcessGroup, sequence: bool
    ) -> None:
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = _part(linear.weight, 0, rows)
        self.bias = None if linear.bias is None else _part(linear.bias, 0, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T or T_local, D) -> (B, T, outputs_local)."""
        out = _ColumnLinear.apply(x, self.weight, self.group, self.sequence)
        return out if self.bias is None else out + self.bias


class RowParallelLinear(nn.Module):
    """nn.Linear cut along its inputs; the bias is added once, after the sum.

    Args: as for ColumnParallelLinear; `columns` are the inputs that this rank keeps. With
        `sequence` the output is cut along T, and so is what the bias sees: its gradient is summed
        over the group.
    """

    def __init__(
        self,
        linear: nn.Linear,
        columns: tuple[int, int],
        group: dist.ProcessGroup,
        sequence: bool,
    ) -> None:
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = _part(linear.weight, 1, columns)
        self.bias = None if linear.bias is None else _part(linear.bias, 0, (0, len(linear.bias)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs_local) -> (B, T or T_local, D)."""
        partial = F.linear(x, self.weight)
        if not self.sequence:
            out = reduce_from_group(partial, self.group)
            return out if self.bias is None else out + self.bias
        out = scatter_sequence(partial, self.group)
        return out if self.bias is None else out + copy_to_group(self.bias, self.group)


class VocabParallelEmbedding(nn.Module):
    """nn.Embedding cut along the vocabulary; ids of other ranks give zeros, then the sum.

    Args: as for ColumnParallelLinear; `rows` are the ids that this rank keeps. With `sequence` the
        output is cut along T.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        rows: tuple[int, int],
        group: dist.ProcessGroup,
        sequence: bool,
    ) -> None:
        super().__init__()
        self.group, self.sequence, self.rows = group, sequence, rows
        self.num_embeddings = embedding.num_embeddings
        self.weight = _part(embedding.weight, 0, rows)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T or T_local, D)."""
        begin, end = self.rows
        elsewhere = (ids < begin) | (ids >= end)
        local = F.embedding((ids - begin).masked_fill(elsewhere, 0), self.weight)
        partial = local.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence:
            return scatter_sequence(partial, self.group)
        return reduce_from_group(partial, self.group)


class SequenceSlicedEmbedding(nn.Module):
    """A table of positions in front of a sequence-parallel region: each rank looks up its own T.

    Every rank holds the whole table and sees a part of the positions: the gradients are summed.
    """

    def __init__(self, embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.num_embeddings = embedding.num_embeddings
        self.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B or 1, T) -> (B or 1, T_local, D)."""
        return F.embedding(own_slice(ids, self.group), copy_to_group(self.weight, self.group))


class ReplicatedParameters(nn.Module):
    """A module whose parameters every rank holds whole while its input is only a part.

    Norms in a sequence-parallel region see T_local positions, a norm over heads sees the local
    heads: each rank's gradient is a part, and the parts are summed. The sum is in the graph
    (copy_to_group), so that it is right under every engine.

    Args:
        module: the original; its parameters are taken over under their names.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # in a tuple, hence not registered: its own parameters must not be seen twice
        self._template = (module,)

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives, on this rank's part."""
        shared = {n: copy_to_group(p, self.group) for n, p in self.named_parameters(recurse=False)}
        return functional_call(self._template[0], shared, (x,))


def _part(parameter: Tensor, dim: int, interval: tuple[int, int]) -> nn.Parameter:
    """A parameter of the local shape; values are kept where there are any (not on meta)."""
    begin, end = interval
    return nn.Parameter(parameter.detach().narrow(dim, begin, end - begin).clone())
