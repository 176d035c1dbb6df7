"""Cross-entropy over a vocabulary that is cut over ranks; logits are never gathered.

With logits z cut along V and m, Z, z_y their maximum, sum of exponentials and target logit:

    loss = log Z + m - z_y      three all-reduces of (B*T): max, then Z and z_y together
    d loss / d z_j = exp(z_j - m) / Z - [j = y]      local
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first_id: int,
        ignore_index: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        shifted = logits.float()
        largest = shifted.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = shifted - largest.unsqueeze(-1)
        local = labels - first_id
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp()
        sums = torch.stack((exponentials.sum(dim=-1), target))
        dist.all_reduce(sums, group=group)
        normaliser, target = sums[0], sums[1]
        counted = labels != ignore_index
        ctx.save_for_backward(exponentials, normaliser, local, elsewhere, counted)
        ctx.dtype = logits.dtype
        return (normaliser.log() - target).masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials, normaliser, local, elsewhere, counted = ctx.saved_tensors
        out = exponentials / normaliser.unsqueeze(-1)
        hit = (~elsewhere).to(out.dtype).unsqueeze(-1)
        out.scatter_add_(-1, local.unsqueeze(-1), -hit)
        out *= (grad * counted).unsqueeze(-1)
        return out.to(ctx.dtype), None, None, None, None


def vocab_parallel_argmax(logits: Tensor, *, first_id: int, group: dist.ProcessGroup) -> Tensor:
    """The id of the largest of the whole vocabulary's logits, the same on every rank.

    Args:
        logits: (N, V_local), this rank's part of the vocabulary.
        first_id: first id of this rank's part.
        group: the ranks that share the vocabulary.

    Returns:
        (N,) int64; of several largest the smallest id.
    """
    largest, local = logits.float().max(dim=-1)
    overall = largest.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    ids = (local + first_id).masked_fill(largest < overall, torch.iinfo(torch.int64).max)
    dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=group)
    return ids


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    first_id: int,
    group: dist.ProcessGroup,
    ignore_index: int = -100,
) -> Tensor:
    """Sum of the cross-entropies, in nats, the same on every rank of the group.

    Args:
        logits: (N, V_local), this rank's part of the vocabulary.
        labels: (N,) ids of the whole vocabulary; `ignore_index` does not count.
        first_id: first id of this rank's part.
        group: the ranks that share the vocabulary.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, first_id, ignore_index, group)
