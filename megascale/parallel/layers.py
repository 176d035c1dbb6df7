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

from megascale.models.activated_linear import ActivatedLinear
from megascale.models.linear import Products, linear
from megascale.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    own_slice,
    reduce_from_group,
    scatter_sequence,
)


class _Visit:
    """One pass of an input through the layers of a `FanOut`.

    Attributes:
        source: the input, to recognise it.
        waiting: layers that have not run their backward yet.
    """

    def __init__(self, source: Tensor) -> None:
        self.source, self.waiting = source.data_ptr(), 0
        self._whole: Tensor | None = None
        self._grad: Tensor | None = None

    def whole(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The input gathered along T: once in the forward, once more in the backward."""
        if self._whole is None:
            self._whole = all_gather_sequence(x, group)
        return self._whole

    def forget(self) -> None:
        """Free the gathered input."""
        self._whole = None

    def add(self, grad: Tensor) -> Tensor | None:
        """Add a layer's part of the input's gradient; the sum when it was the last one."""
        self._grad = grad if self._grad is None else self._grad.add_(grad)
        self.waiting -= 1
        if self.waiting:
            return None
        total, self._grad = self._grad, None
        return total


class FanOut:
    """The column-parallel layers that read the same input: query, key, value, or gate and up.

    They are one matrix [A_q | A_k | A_v] to the network: one all-gather brings the input of all,
    and one collective sums their gradients of it. Each layer runs once in each pass.
    """

    def __init__(self) -> None:
        self.members = 0
        self._joined = 0
        self._visit: _Visit | None = None

    def visit(self, x: Tensor) -> _Visit:
        """The pass that a layer with input `x` belongs to."""
        if self._visit is None or self._visit.source != x.data_ptr():
            self._visit, self._joined = _Visit(x), 0
        visit = self._visit
        visit.waiting += 1
        self._joined += 1
        if self._joined == self.members:
            self._visit = None
        return visit

    def complete(self) -> bool:
        """Whether the layer that joined last was the last of its pass."""
        return self._visit is None


class _ColumnLinear(torch.autograd.Function):
    """X A_i with the backward's communication beside the weight's gradient.

    forward:   [all-gather X along T]  ->  Y_i = X A_i
    backward:  dX = dY_i A_i^T  --all-reduce [reduce-scatter] starts-->  dA_i = X^T dY_i  --wait

    Of several layers with the same input the first gathers, and the last one in the backward
    communicates the sum of their dX.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, sequence: bool, fan: FanOut
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the local part only; gathered again in the backward
        ctx.group, ctx.sequence, ctx.visit = group, sequence, fan.visit(x)
        ctx.products = Products(weight)
        out = ctx.products.output(ctx.visit.whole(x, group) if sequence else x, weight, None)
        if fan.complete():
            ctx.visit.forget()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        # fetched before anything else uses the network
        whole = ctx.visit.whole(x, ctx.group) if ctx.sequence else x
        total = ctx.visit.add(ctx.products.input_gradient(grad, weight))
        pending = None if total is None else _start_sum(total, ctx.group, ctx.sequence)
        grad_weight, _ = ctx.products.gradients(grad, whole)
        if pending is None:
            return None, grad_weight, None, None, None
        ctx.visit.forget()
        work, summed = pending
        work.wait()
        return (summed.transpose(0, 1) if ctx.sequence else summed), grad_weight, None, None, None


def _start_sum(grad: Tensor, group: dist.ProcessGroup, sequence: bool) -> tuple[dist.Work, Tensor]:
    """Start the sum of (B, T, D) over the ranks; gives (B, T, D), or own (T_local, B, D)."""
    if not sequence:
        summed = grad.contiguous()
        return dist.all_reduce(summed, group=group, async_op=True), summed
    source = grad.transpose(0, 1).contiguous()  # (T, B, D)
    summed = source.new_empty((source.shape[0] // dist.get_world_size(group), *source.shape[1:]))
    return dist.reduce_scatter_tensor(summed, source, group=group, async_op=True), summed


class ColumnParallelLinear(nn.Module):
    """nn.Linear cut along its outputs.

    Args:
        linear: the whole layer (may be on the meta device); its parameters are replaced by local
            ones of the same names.
        rows: outputs that this rank keeps, half-open.
        sequence: whether the input is cut along T.
        fan: the layers with the same input; this one joins them.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rows: tuple[int, int],
        group: dist.ProcessGroup,
        sequence: bool,
        fan: FanOut,
    ) -> None:
        super().__init__()
        self.group, self.sequence, self.fan = group, sequence, fan
        fan.members += 1
        self.weight = _part(linear.weight, 0, rows)
        self.bias = None if linear.bias is None else _part(linear.bias, 0, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T or T_local, D) -> (B, T, outputs_local)."""
        out = _ColumnLinear.apply(x, self.weight, self.group, self.sequence, self.fan)
        return out if self.bias is None else out + self.bias


class RowParallelLinear(nn.Module):
    """nn.Linear cut along its inputs, activated or not; the bias is added once, after the sum.

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
        self.product = linear.product if isinstance(linear, ActivatedLinear) else _product
        self.weight = _part(linear.weight, 1, columns)
        self.bias = None if linear.bias is None else _part(linear.bias, 0, (0, len(linear.bias)))

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B, T, inputs_local) -> (B, T or T_local, D)."""
        partial = self.product(self.weight, None, *inputs)
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


def _product(weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
    """Of a layer without activation."""
    (x,) = inputs
    return linear(x, weight, bias)


def _part(parameter: Tensor, dim: int, interval: tuple[int, int]) -> nn.Parameter:
    """A parameter of the local shape; values are kept where there are any (not on meta)."""
    begin, end = interval
    return nn.Parameter(parameter.detach().narrow(dim, begin, end - begin).clone())
