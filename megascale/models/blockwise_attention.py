"""Attention a block of queries at a time: memory O(T x block), for every rule of what is seen.

    forward   of each block of rows R:  P = softmax(scale Q_R K_C^T),  O_R = P V_C
    backward  P once more, then         dV_C += P^T dO_R,  dS = P * (dP - sum(dP * P)) with
              dP = dO_R V_C^T,          dQ_R = scale dS K_C,  dK_C += scale dS^T Q_R

where C are the columns that some row of R may see: keys after the block, or before its window, are
never multiplied. Unlike flash attention (arXiv:2205.14135) a row's scores are in memory together,
so that the softmax is the library's own kernel, which on CPU is what counts: half precision spends
most of the time of torch's fused kernel in its softmax. Heads are taken as many at a time as keep
a block's scores in the caches.

The dropout of probabilities is a function of the sample (dropout.py) and is drawn for the block;
a bound on the scores (arXiv:2408.00118, section 2) is applied to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megascale.kernels.library import LIBRARY
from megascale.kernels.passes import attend_, attend_backward_
from megascale.models.dropout import CounterDropout
from megascale.wide import wide_dtype, widen

if TYPE_CHECKING:
    from megascale.models.attention import Visibility

BLOCK = 128
"""Queries of a block."""

SCORES = 2**20
"""Scores that are worked on at a time, where one head's are not more."""


@dataclass(frozen=True)
class Scoring:
    """How scores become probabilities.

    Attributes:
        visibility: which keys a query sees. scale: factor of the products.
        softcap: see `CoreAttention`.
        dropout: of the probabilities; None for none. keys: (B,) of the samples.
        num_heads: H, of the query.
    """

    visibility: Visibility
    scale: float
    softcap: float | None = None
    dropout: CounterDropout | None = None
    keys: Tensor | None = None
    num_heads: int = 0


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """``query`` (B, H, T, K), ``key`` and ``value`` (B, H_kv, T, K) -> (B, H, T, K).

    H_kv divides H; query head h reads the keys of head ``h * H_kv // H``.
    """
    return _BlockwiseAttention.apply(query, key, value, scoring)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scoring = scoring
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for heads in _groups(query, key, value, scoring):
            out_rows = heads.of_query(out)
            for rows, columns in heads.blocks():
                probabilities, _ = heads.probabilities(rows, columns)
                weights = _dropped(probabilities, heads.kept(rows, columns))
                own = out_rows[..., rows, :]
                own.copy_((weights @ heads.value[:, columns]).view(own.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        of_query, of_key, of_value = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
        )
        for heads in _groups(query, key, value, ctx.scoring):
            heads.differentiate(grad, of_query, of_key, of_value)
        return of_query, of_key, of_value, None


def _groups(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Iterator[_Heads]:
    """All heads of all samples, as many together as keep a block's scores small."""
    samples, heads, length = key.shape[:3]
    of_head = query.shape[1] // heads * min(BLOCK, length) * length
    together = max(1, SCORES // of_head)
    for sample in range(0, samples, max(1, together // heads)):
        for head in range(0, heads, min(together, heads)):
            part = (
                slice(sample, sample + max(1, together // heads)),
                slice(head, head + min(together, heads)),
            )
            yield _Heads(part, query, key, value, scoring)


class _Heads:
    """Some key heads of some samples, with the query heads that read them.

    In shapes n counts them, R are the rows of a block times the query heads of one key head.

    Args:
        part: the samples and the key heads.
        query, key, value: of all. scoring: of all.
    """

    def __init__(
        self,
        part: tuple[slice, slice],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> None:
        self._part, self._scoring = part, scoring
        self._visibility = scoring.visibility.of_samples(part[0])
        self._compiled = scoring.softcap is None and LIBRARY.takes(query)
        self._group = query.shape[1] // key.shape[1]
        self._length = query.shape[2]
        self._query = self.of_query(query)
        self.key, self.value = (t[part].flatten(0, 1) for t in (key, value))  # (n, T, K)

    def of_query(self, tensor: Tensor) -> Tensor:
        """The part of a tensor like the query as (samples, heads, query heads of each, T, K)."""
        return tensor.unflatten(1, (-1, self._group))[self._part]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of each block, and the columns that any of them may see."""
        visibility = self._visibility
        for first in range(0, self._length, BLOCK):
            last = min(first + BLOCK, self._length)
            begin = 0 if visibility.window is None else max(0, first - visibility.window + 1)
            yield slice(first, last), slice(begin, last if visibility.causal else self._length)

    def folded(self, tensor: Tensor, rows: slice) -> Tensor:
        """(n, R, K), contiguous, of some rows of `of_query`."""
        return tensor[..., rows, :].flatten(2, 3).flatten(0, 1)

    def probabilities(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(n, R, C), and how the scores follow the products where they are bounded."""
        query, key = self.folded(self._query, rows), self.key[:, columns]
        if self._compiled:
            scores = torch.bmm(query, key.transpose(1, 2))
            if self._visibility.differs_by_sample:
                self._hide(scores, rows, columns)
            return attend_(scores, self._seen(rows, columns), self._scoring.scale), None
        nothing = query.new_zeros(()).expand(*query.shape[:2], key.shape[1])
        scores = torch.baddbmm(
            nothing, query, key.transpose(1, 2), beta=0, alpha=self._scoring.scale
        )
        slope, softcap = None, self._scoring.softcap
        if softcap is not None:
            turned = torch.tanh(widen(scores) / softcap)
            slope = 1 - turned.square()
            scores = (softcap * turned).to(scores.dtype)
        self._hide(scores, rows, columns)
        return torch.softmax(scores, dim=-1), slope

    def _seen(self, rows: slice, columns: slice) -> Tensor:
        """(2, rows) int32: the columns, counted from the first, that a row may see."""
        places = torch.arange(rows.start, rows.stop, dtype=torch.int32)
        begin, end = torch.zeros_like(places), torch.full_like(places, columns.stop)
        if self._visibility.window is not None:
            begin = places - (self._visibility.window - 1)
        if self._visibility.causal:
            end = places + 1
        return (torch.stack([begin, end]) - columns.start).clamp_(0, columns.stop - columns.start)

    def _hide(self, scores: Tensor, rows: slice, columns: slice) -> None:
        """Set what a query does not see to -inf, in place."""
        by_head = self._by_head(scores)
        for begin in range(columns.start, columns.stop, BLOCK):
            end = min(begin + BLOCK, columns.stop)
            if self._visibility.sees((rows.start, rows.stop), (begin, end)):
                continue
            bias = self._visibility.bias((rows.start, rows.stop), (begin, end), scores)
            by_head[..., begin - columns.start : end - columns.start].add_(bias)

    def _by_head(self, scores: Tensor) -> Tensor:
        """(n, R, C) as (samples, query heads, rows, C)."""
        samples, heads = self._query.shape[:2]
        return scores.view(samples, heads * self._group, -1, scores.shape[-1])

    def kept(self, rows: slice, columns: slice) -> Tensor | None:
        """(n, R, C), what dropout multiplies probabilities with; None for none."""
        dropout, keys = self._scoring.dropout, self._scoring.keys
        if dropout is None:
            return None
        assert keys is not None
        samples, heads = self._part
        count = self._scoring.num_heads
        all_heads, full_heads = dropout.coordinates(0, count, keys.device)
        own = all_heads[heads.start * self._group : heads.stop * self._group]
        places, length = dropout.coordinates(1, self._length, keys.device)
        keep = dropout.keep(
            keys[samples],
            (own, places[rows], places[columns]),
            (full_heads, length, length),
        )
        factor = keep.to(self.value.dtype) * (1.0 / (1.0 - dropout.p))
        return factor.view(len(self.key), -1, factor.shape[-1])

    def _of_scores(
        self,
        of_weights: Tensor,
        probabilities: Tensor,
        slope: Tensor | None,
        rows: slice,
        columns: slice,
    ) -> Tensor:
        """The gradient of the products, but for the scale where nothing is compiled."""
        if self._compiled:
            seen = self._seen(rows, columns)
            return attend_backward_(of_weights, probabilities, seen, self._scoring.scale)
        of_scores = torch.ops.aten._softmax_backward_data(
            of_weights, probabilities, -1, probabilities.dtype
        )
        return of_scores if slope is None else (of_scores * slope).to(of_scores.dtype)

    def differentiate(
        self, grad: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> None:
        """Write the gradients of these heads, given the output's, to their places in all."""
        scale = 1.0 if self._compiled else self._scoring.scale
        of_out, of_query = self.of_query(grad), self.of_query(grad_query)
        of_key, of_value = (
            torch.zeros(t.shape, dtype=wide_dtype(t.dtype), device=t.device)
            for t in (self.key, self.value)
        )
        for rows, columns in self.blocks():
            probabilities, slope = self.probabilities(rows, columns)
            out = self.folded(of_out, rows)
            kept = self.kept(rows, columns)
            of_value[:, columns] += _dropped(probabilities, kept).transpose(1, 2) @ out
            of_weights = _dropped(out @ self.value[:, columns].transpose(1, 2), kept)
            of_scores = self._of_scores(of_weights, probabilities, slope, rows, columns)
            of_key[:, columns] += of_scores.transpose(1, 2) @ self.folded(self._query, rows)
            own = of_query[..., rows, :]
            torch.mul((of_scores @ self.key[:, columns]).view(own.shape), scale, out=own)
        for total, whole, factor in ((of_key, grad_key, scale), (of_value, grad_value, 1.0)):
            own = whole[self._part]
            own.copy_((total * factor).view(own.shape))


def _dropped(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept
