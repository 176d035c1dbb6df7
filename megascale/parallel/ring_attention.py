"""Ring attention: exact attention over a sequence that is cut over ranks (arXiv:2310.01889).

Each of n ranks keeps its queries; keys and values go round, so that after n - 1 sends every rank
has seen all of them, and never more than two ranks' at once:

    step s:   rank r computes with the keys of rank r - s   |   sends them on to rank r + 1

What a rank sees adds up by the online softmax (arXiv:1805.02867): with m the largest score so far,
l the sum of exp(score - m) and o that of exp(score - m) V, a larger m scales l and o down. m, l
and o are fp32. The backward takes the saved log of l and goes round once more, with the gradients
of keys and values travelling beside them, in fp32, until they are home (arXiv:2307.08691).

Work is done in tiles of queries and keys, each within one chunk of the sequence. What a tile's
queries see follows from its places in the whole sample: nothing (the tile is left out, which is
half of them when causal, and what a window leaves), everything (no mask), or a mask is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.wide import wide_dtype, widen

TILE = 1024
"""Most queries, and keys, of a tile: bounds the memory of scores that exist at a time."""


class Visible(Protocol):
    """Which keys a query sees, by their places in the sample (models.attention.Visibility)."""

    def mask(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(B or 1, 1, R or 1, C) bool."""
        ...

    def sees(self, rows: tuple[int, int], columns: tuple[int, int]) -> bool | None:
        """True: all keys; False: none; None: ask `mask`."""
        ...


@dataclass(frozen=True)
class Ring:
    """What one call of ring attention needs to know.

    Attributes:
        group, rank, size: the ranks of the ring.
        visibility: which keys a query sees.
        root: scores are divided by it.
        softcap: bound c of the scores, which become c * tanh(score / c); None for none.
        dropout: probability of dropping a probability; 0: none.
        keep: (R,), (C,) places of queries and keys -> (B, H, R, C) bool, what dropout leaves.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    visibility: Visible
    root: float
    softcap: float | None
    dropout: float
    keep: Callable[[Tensor, Tensor], Tensor]


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
    """Attention of this rank's queries over all ranks' keys; differentiable, collective.

    Args:
        query: (B, H, T_local, K); key, value: (B, H_kv, T_local, K), H_kv divides H. The tokens
            are the chunks r and 2 n - 1 - r of the sample's 2 n.

    Returns:
        (B, H, T_local, K).
    """
    return _RingAttention.apply(query, key, value, ring)


@dataclass(frozen=True)
class _Span:
    """Tokens begin..end of what a rank holds, and where the first of them is in the sample."""

    begin: int
    end: int
    place: int

    @property
    def interval(self) -> tuple[int, int]:
        return self.place, self.place + self.end - self.begin

    @property
    def local(self) -> slice:
        return slice(self.begin, self.end)

    def places(self, device: torch.device) -> Tensor:
        return torch.arange(*self.interval, device=device)


def _spans(rank: int, size: int, length: int) -> list[_Span]:
    """What a rank of the ring holds, `length` tokens in two chunks, in tiles."""
    chunk = length // 2
    return [
        _Span(half * chunk + at, half * chunk + min(at + TILE, chunk), number * chunk + at)
        for half, number in enumerate((rank, 2 * size - 1 - rank))
        for at in range(0, chunk, TILE)
    ]


def _tiles(ring: Ring, owner: int, length: int) -> Iterator[tuple[_Span, _Span, bool]]:
    """(queries, keys of rank `owner`, whether a mask is needed) of every tile that is not empty."""
    for rows in _spans(ring.rank, ring.size, length):
        for columns in _spans(owner, ring.size, length):
            seen = ring.visibility.sees(rows.interval, columns.interval)
            if seen is not False:
                yield rows, columns, seen is None


class _Pass:
    """A tensor on its way to the next rank while the one that came is used."""

    def __init__(self, tensor: Tensor, ring: Ring) -> None:
        def global_rank(step: int) -> int:
            return dist.get_global_rank(ring.group, (ring.rank + step) % ring.size)

        self._sent = tensor.contiguous()
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, global_rank(1), group=ring.group),
                dist.P2POp(dist.irecv, self._received, global_rank(-1), group=ring.group),
            ]
        )

    def wait(self) -> Tensor:
        """What the rank before sent."""
        for work in self._works:
            work.wait()
        return self._received


def _rounds(keys_values: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """(owner, its keys and values) of every rank, the next ones on their way meanwhile."""
    for step in range(ring.size):
        under_way = _Pass(keys_values, ring) if step < ring.size - 1 else None
        yield (ring.rank - step) % ring.size, keys_values
        if under_way is not None:
            keys_values = under_way.wait()


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) -> (B, H_kv, H / H_kv, ...): the queries of each key head."""
    return x.unflatten(1, (kv_heads, -1))


def _scores(query: Tensor, key: Tensor, rows: _Span, columns: _Span, ring: Ring) -> Tensor:
    """(B, H_kv, G, R, C) fp32 scores of a tile, bounded by the soft-cap, not masked."""
    product = query[..., rows.local, :] @ key[:, :, None, columns.local, :].transpose(-1, -2)
    scores = widen(product) / ring.root
    return scores if ring.softcap is None else ring.softcap * torch.tanh(scores / ring.softcap)


def _hidden(rows: _Span, columns: _Span, ring: Ring, device: torch.device) -> Tensor:
    """(B or 1, 1, 1, R or 1, C) bool: True where a query of a tile does not see a key."""
    mask = ring.visibility.mask(rows.places(device), columns.places(device))
    return ~mask.unsqueeze(1)


def _drop(x: Tensor, rows: _Span, columns: _Span, ring: Ring) -> Tensor:
    """(B, H_kv, G, R, C) probabilities, or their gradients, after dropout."""
    if not ring.dropout:
        return x
    keep = ring.keep(rows.places(x.device), columns.places(x.device))
    return x.masked_fill(~_grouped(keep, x.shape[1]), 0.0) * (1.0 / (1.0 - ring.dropout))


class _Sums:
    """The online softmax of all local queries: m, l and o of the module's docstring."""

    def __init__(self, query: Tensor) -> None:
        self.out = torch.zeros_like(
            query, dtype=wide_dtype(query.dtype)
        )  # (B, H_kv, G, T_local, K)
        self.total = self.out.new_zeros(query.shape[:-1])
        self.largest = self.out.new_full(query.shape[:-1], -math.inf)

    def add(self, scores: Tensor, value: Tensor, rows: _Span, columns: _Span, ring: Ring) -> None:
        """Take in a tile's masked scores (B, H_kv, G, R, C) and its values (B, H_kv, C, K)."""
        before = self.largest[..., rows.local]
        largest = torch.maximum(before, scores.amax(-1))
        # a row that has seen no key yet: -inf - -inf would be NaN
        shift = largest.masked_fill(largest == -math.inf, 0.0)
        scale = torch.exp(before - shift)
        weights = torch.exp(scores - shift.unsqueeze(-1))
        dropped = _drop(weights, rows, columns, ring).to(value.dtype)
        before.copy_(largest)
        self.total[..., rows.local].mul_(scale).add_(weights.sum(-1))
        out = self.out[..., rows.local, :]
        out.mul_(scale.unsqueeze(-1)).add_(dropped @ value.unsqueeze(2))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        queries = _grouped(query, key.shape[1])
        sums = _Sums(queries)
        for owner, (keys, values) in _rounds(torch.stack((key, value)), ring):
            for rows, columns, masked in _tiles(ring, owner, query.shape[2]):
                scores = _scores(queries, keys, rows, columns, ring)
                if masked:
                    scores.masked_fill_(_hidden(rows, columns, ring, query.device), -math.inf)
                sums.add(scores, values[:, :, columns.local], rows, columns, ring)
        out = (sums.out / sums.total.unsqueeze(-1)).flatten(1, 2).to(query.dtype)
        log_total = (sums.largest + sums.total.log()).flatten(1, 2)  # (B, H, T_local)
        ctx.save_for_backward(query, key, value, out, log_total)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_total = ctx.saved_tensors
        ring, heads = ctx.ring, key.shape[1]
        queries, grads, log_total = (_grouped(t, heads) for t in (query, grad, log_total))
        # sum over keys of P dP, which the softmax's gradient takes off (arXiv:2307.08691)
        inner = _grouped((widen(out) * widen(grad)).sum(-1), heads)
        grad_query = torch.zeros_like(queries, dtype=wide_dtype(queries.dtype))
        grad_kv = torch.zeros((2, *key.shape), dtype=wide_dtype(key.dtype), device=key.device)
        arriving: _Pass | None = None
        for owner, (keys, values) in _rounds(torch.stack((key, value)), ring):
            part = torch.zeros_like(grad_kv)
            for rows, columns, masked in _tiles(ring, owner, query.shape[2]):
                tile = _Tile(rows, columns, masked, ring)
                tile.backward(queries, keys, values, grads, log_total, inner, grad_query, part)
            # the sum so far came from the rank before, while this rank's part was computed
            grad_kv = part if arriving is None else arriving.wait() + part
            arriving = _Pass(grad_kv, ring)
        assert arriving is not None
        grad_key, grad_value = arriving.wait()  # the last send brings them home
        grad_query = grad_query.flatten(1, 2).to(query.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


@dataclass(frozen=True)
class _Tile:
    """One tile of the backward."""

    rows: _Span
    columns: _Span
    masked: bool
    ring: Ring

    def backward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        grads: Tensor,
        log_total: Tensor,
        inner: Tensor,
        grad_query: Tensor,
        grad_kv: Tensor,
    ) -> None:
        """Add what this tile gives to `grad_query` and `grad_kv` (keys first)."""
        rows, columns, ring = self.rows, self.columns, self.ring
        scores = _scores(queries, keys, rows, columns, ring)
        probabilities = torch.exp(scores - log_total[..., rows.local].unsqueeze(-1))
        if self.masked:
            probabilities.masked_fill_(_hidden(rows, columns, ring, queries.device), 0.0)
        grad = grads[..., rows.local, :]  # (B, H_kv, G, R, K)
        dropped = _drop(probabilities, rows, columns, ring).to(grad.dtype)
        # sums over the G queries of a key head
        grad_kv[1, :, :, columns.local] += widen(dropped.transpose(-1, -2) @ grad).sum(2)
        value = values[:, :, None, columns.local]
        grad_p = _drop(widen(grad @ value.transpose(-1, -2)), rows, columns, ring)
        grad_s = probabilities * (grad_p - inner[..., rows.local].unsqueeze(-1))
        if ring.softcap is not None:
            grad_s = grad_s * (1 - (scores / ring.softcap).square())
        grad_s = (grad_s / ring.root).to(queries.dtype)
        grad_query[..., rows.local, :] += grad_s @ keys[:, :, None, columns.local]
        grad_kv[0, :, :, columns.local] += widen(
            grad_s.transpose(-1, -2) @ queries[..., rows.local, :]
        ).sum(2)
