"""Cross-entropy over a vocabulary that is cut over ranks; logits are never gathered.

With logits z cut along V and m, Z, z_y their maximum, sum of exponentials and target logit:

    loss = log Z + m - z_y      two all-reduces: the maximum of (B*T), then Z and z_y of (2, B*T)
    d loss / d z_j = exp(z_j - m) / Z - [j = y]      local

With label smoothing e and z-loss c there is the mean logit over the whole vocabulary, a third row
of the second all-reduce, and with L = log Z + m

    loss = L - (1 - e) z_y - e mean(z) + c L^2
    d loss / d z_j = (1 + 2 c L) exp(z_j - m) / Z - (1 - e) [j = y] - e / V
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.wide import widen


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first_id: int,
        ignore_index: int,
        group: dist.ProcessGroup,
        smoothing: tuple[float, int],
        z_loss: float,
    ) -> Tensor:
        share, vocab_size = smoothing
        shifted = widen(logits)
        largest = shifted.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = shifted - largest.unsqueeze(-1)
        local = labels - first_id
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp()
        rows = [exponentials.sum(dim=-1), target]
        if share:
            rows.append(shifted.sum(dim=-1))
        sums = torch.stack(rows)
        dist.all_reduce(sums, group=group)
        normaliser, target = sums[0], sums[1]
        if share:
            target = (1 - share) * target + share / vocab_size * sums[2]
        counted = labels != ignore_index
        log_z = normaliser.log() + largest
        ctx.save_for_backward(exponentials, normaliser, log_z, local, elsewhere, counted)
        ctx.dtype, ctx.smoothing, ctx.z_loss = logits.dtype, smoothing, z_loss
        losses = normaliser.log() - target
        if z_loss:
            losses = losses + z_loss * log_z.square()
        return losses.masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exponentials, normaliser, log_z, local, elsewhere, counted = ctx.saved_tensors
        share, vocab_size = ctx.smoothing
        out = exponentials / normaliser.unsqueeze(-1)
        if ctx.z_loss:
            out *= (1 + 2 * ctx.z_loss * log_z).unsqueeze(-1)
        hit = (~elsewhere).to(out.dtype).unsqueeze(-1)
        out.scatter_add_(-1, local.unsqueeze(-1), -(1 - share) * hit)
        if share:
            out -= share / vocab_size
        out *= (grad * counted).unsqueeze(-1)
        return out.to(ctx.dtype), None, None, None, None, None, None


def vocab_parallel_argmax(logits: Tensor, *, first_id: int, group: dist.ProcessGroup) -> Tensor:
    """The id of the largest of the whole vocabulary's logits, the same on every rank.

    Args:
        logits: (N, V_local), this rank's part of the vocabulary.
        first_id: first id of this rank's part.
        group: the ranks that share the vocabulary.

    Returns:
        (N,) int64; of several largest the smallest id.
    """
    largest, local = widen(logits).max(dim=-1)
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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int = 0,
) -> Tensor:
    """Sum of the cross-entropies, in nats, the same on every rank of the group.

    Args:
        logits: (N, V_local), this rank's part of the vocabulary.
        labels: (N,) ids of the whole vocabulary; `ignore_index` does not count.
        first_id: first id of this rank's part.
        group: the ranks that share the vocabulary.
        label_smoothing: share of a target's probability that is spread over the vocabulary.
        z_loss: coefficient of log(Z)^2 of each target.
        vocab_size: V of the whole vocabulary; needed with label smoothing.
    """
    assert not label_smoothing or vocab_size >= logits.shape[-1], vocab_size
    return _VocabParallelCrossEntropy.apply(
        logits, labels, first_id, ignore_index, group, (label_smoothing, vocab_size), z_loss
    )


def whole_vocabulary(
    logits: Tensor, *, first_id: int, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """All logits (..., V) on every rank from their parts (..., V_local); without gradients."""
    whole = logits.new_zeros(*logits.shape[:-1], vocab_size)
    whole[..., first_id : first_id + logits.shape[-1]] = logits
    dist.all_reduce(whole, group=group)
    return whole
