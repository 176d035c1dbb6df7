"""Self-attention, causal or bidirectional, with grouped key and value heads.

The number of heads is read from the width of a projection's output, so that a model whose
projections were cut along the heads (tensor parallelism) runs through the same lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.models.blockwise_attention import Scoring, blockwise_attention
from megascale.models.compiled_attention import compiled_attention
from megascale.models.dropout import CounterDropout
from megascale.models.linear import Linear
from megascale.models.rotary import Rotary, apply_rotary, rotary_tables

AttentionKernel = Literal["auto", "sdpa", "blockwise"]


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys a query sees, as data of the whole sample.

    A mask is made of it where attention is computed, of the rows and columns that are there, so
    that a sequence which is cut over ranks has the same rule at its seams as elsewhere.

    Attributes:
        causal: a query sees no key after its own.
        window: a query sees no key that is so many positions back (arXiv:2310.06825); None: all.
        document_ids: (B, T) integers, equal within a document; a query sees its own only, and
            always itself, so that padding with an id of its own has a key to look at.
        real: (B, T), 0 at padding, whose keys nobody sees, and 1 elsewhere.
    """

    causal: bool = True
    window: int | None = None
    document_ids: Tensor | None = None
    real: Tensor | None = None
    _made: dict[int, Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _intervals: dict[int, Tensor | None] = field(default_factory=dict)

    def mask(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``(B or 1, 1, R or 1, C)`` bool, True where a query sees a key.

        Args:
            rows, columns: (R,), (C,) integers, places of queries and keys in the sample.
        """
        back = rows[:, None] - columns[None, :]  # (R, C)
        seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rows.device)
        if self.causal:
            seen = seen & (back >= 0)
        if self.window is not None:
            seen = seen & (back < self.window)
        if self.real is not None:
            seen = seen & self.real.bool()[:, None, None, columns]
        if self.document_ids is not None:
            queries = self.document_ids[:, None, rows, None]
            seen = seen & (queries == self.document_ids[:, None, None, columns]) | (back == 0)
        return seen.expand(-1, -1, -1, len(columns))

    @property
    def differs_by_sample(self) -> bool:
        """Whether samples have documents or padding of their own."""
        return self.document_ids is not None or self.real is not None

    def of_samples(self, samples: slice) -> Visibility:
        """The same of some of the samples."""
        if not self.differs_by_sample:
            return self
        documents = None if self.document_ids is None else self.document_ids[samples]
        real = None if self.real is None else self.real[samples]
        return Visibility(self.causal, self.window, documents, real)

    def bias(self, rows: tuple[int, int], columns: tuple[int, int], like: Tensor) -> Tensor:
        """What is added to the scores of an interval of queries and one of keys: -inf where a
        query does not see a key, ``(B or 1, 1, R, C)`` in the type of ``like``. Made once where it
        is the same for all samples, which then only the distance of the intervals decides.
        """
        same = not self.differs_by_sample
        key = (rows[0] - columns[0], rows[1] - rows[0], columns[1] - columns[0], like.dtype)
        if same and key in self._biases:
            return self._biases[key]
        places = (torch.arange(*ends, device=like.device) for ends in (rows, columns))
        mask = self.mask(*places)
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
        bias.masked_fill_(~mask, -math.inf)
        if same:
            self._biases[key] = bias
        return bias

    def sees(self, rows: tuple[int, int], columns: tuple[int, int]) -> bool | None:
        """Whether the queries of an interval see all keys of another: True, False (they see none)
        or None (some, or it depends on the sample). Intervals are half-open.
        """
        nearest, farthest = rows[0] - columns[1] + 1, rows[1] - 1 - columns[0]  # positions back
        if self.causal and farthest < 0:
            return False
        if self.window is not None and nearest >= self.window:
            return False
        if self.differs_by_sample:
            return None
        ends = (self.causal and nearest < 0) or (
            self.window is not None and farthest >= self.window
        )
        return None if ends else True

    def intervals(self, length: int) -> Tensor | None:
        """``(B or 1, 2, T)`` int32: a query sees the keys [first, last) of the T = ``length``, one
        at least; None where what some query sees is no such interval. Made once, on the CPU.
        """
        if length not in self._intervals:
            self._intervals[length] = self._find_intervals(length)
        return self._intervals[length]

    def _find_intervals(self, length: int) -> Tensor | None:
        places = torch.arange(length, dtype=torch.int32)
        first, last = torch.zeros_like(places)[None], torch.full_like(places, length)[None]
        if self.document_ids is not None:
            if self.real is not None:
                return None
            first, last = _runs(self.document_ids)
            if not torch.equal((first == places).sum(1), _count_distinct(self.document_ids)):
                return None  # a document is in pieces
        if self.real is not None:
            real = self.real.bool()
            first, last = real.int().argmax(1), length - real.flip(1).int().argmax(1)
            if not torch.equal(real.sum(1), last - first):
                return None  # padding in between, or nothing else
            first, last = (ends[:, None].expand(-1, length) for ends in (first, last))
        if self.window is not None:
            first = torch.maximum(first, places - (self.window - 1))
        if self.causal:
            last = torch.minimum(last, places + 1)
        found = torch.stack([first, last], dim=1).to(torch.int32)
        return found if bool((found[:, 0] < found[:, 1]).all()) else None

    def whole(self, length: int, device: torch.device) -> Tensor | None:
        """The mask of all T = ``length`` queries and keys; None where a kernel needs none: causal
        alone, or everything. Made once: its layers share it in the backward pass.
        """
        if not self.differs_by_sample and (self.window is None or self.window >= length):
            return None
        if length not in self._made:
            places = torch.arange(length, device=device)
            self._made[length] = self.mask(places, places)
        return self._made[length]


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last + 1 of the equal neighbours around each place, (B, T) each."""
    changes = ids[:, 1:] != ids[:, :-1]
    length = ids.shape[1]
    places = torch.arange(length)
    starts = F.pad(changes, (1, 0), value=True)
    first = torch.where(starts, places, 0).cummax(1).values
    ends = F.pad(changes, (0, 1), value=True)
    last = torch.where(ends, places + 1, length).flip(1).cummin(1).values.flip(1)
    return first, last


def _count_distinct(ids: Tensor) -> Tensor:
    """(B,) of (B, T)."""
    ordered = ids.sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V with dropout on the probabilities; no parameters.

    Three ways to the same result. torch's fused scaled_dot_product_attention knows neither a bound
    on the scores nor dropout that is a function of the sample, and on CPU it is slow in half
    precision: these are computed a block of queries at a time (blockwise_attention.py), and in
    bf16, where neither is asked for, by a compiled kernel (compiled_attention.py).

    Args:
        dropout: probability for the attention probabilities. dropout_site: see CounterDropout.
        softcap: bound c of the scores, which become c * tanh(score / c); None for none.
        query_scaling: what stands for K under the square root; None for K.
        kernel: "sdpa" or "blockwise" where both can be; "auto" for the faster one.
    """

    def __init__(
        self,
        dropout: float,
        dropout_site: int,
        softcap: float | None = None,
        query_scaling: float | None = None,
        kernel: AttentionKernel = "auto",
    ) -> None:
        super().__init__()
        self.dropout = CounterDropout(dropout, dropout_site)
        self.softcap, self.query_scaling, self.kernel = softcap, query_scaling, kernel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visibility: Visibility,
        keys: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, H, T, K). key, value: (B, H_kv, T, K) with H_kv dividing H.
            visibility: which keys a query sees.
            keys: (B,) dropout keys of the samples.

        Returns:
            (B, H, T, K).
        """
        scale = 1 / math.sqrt(self.query_scaling or query.shape[-1])
        dropping = self.training and self.dropout.p > 0
        if dropping or self.softcap is not None or self._is_blockwise(query):
            if dropping and keys is None:
                raise self.dropout.missing_keys()
            if not dropping and self.softcap is None:
                attended = compiled_attention(query, key, value, visibility, scale)
                if attended is not None:
                    return attended
            dropout = self.dropout if dropping else None
            scoring = Scoring(visibility, scale, self.softcap, dropout, keys, query.shape[1])
            return blockwise_attention(query, key, value, scoring)
        mask = visibility.whole(query.shape[2], query.device)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Repeated here and not by enable_gqa, which some fused kernels answer by falling back
            # to the one that keeps all T x T scores.
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=visibility.causal and mask is None,
            scale=scale,
        )

    def _is_blockwise(self, query: Tensor) -> bool:
        """Measured: on CPU faster in half precision, slower in fp32 (docs/benchmarks.md)."""
        if self.kernel == "auto":
            return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        return self.kernel == "blockwise"


class Attention(nn.Module):
    """Query, key, value and output projections around :class:`CoreAttention`.

    Args:
        hidden_size: D.
        num_heads: H. num_kv_heads: H_kv, divides H (grouped queries, arXiv:2305.13245).
        head_dim: K.
        bias: whether the query, key and value projections have one.
        output_bias: whether the output projection has one; None for as the others.
        rotary: how queries and keys are rotated; None for not at all.
        query_norm, key_norm: norms over the K features of each head, before the rotation; None
            for none (arXiv:2010.04245).
        dropout, dropout_site, softcap, query_scaling, kernel: see CoreAttention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        output_bias: bool | None = None,
        rotary: Rotary | None = None,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        dropout: float,
        dropout_site: int,
        softcap: float | None = None,
        query_scaling: float | None = None,
        kernel: AttentionKernel = "auto",
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary = head_dim, rotary
        self.query = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.output = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.query_norm, self.key_norm = query_norm, key_norm
        self.core = CoreAttention(dropout, dropout_site, softcap, query_scaling, kernel)

    def forward(
        self, x: Tensor, position_ids: Tensor, visibility: Visibility, keys: Tensor | None
    ) -> Tensor:
        """``x`` (B, T, D), ``position_ids`` (B or 1, T), ``keys`` (B,) -> (B, T, D)."""
        query, key, value = (
            projected.view(*projected.shape[:2], -1, self.head_dim)  # (B, T, H_local, K)
            for projected in (self.query(x), self.key(x), self.value(x))
        )
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.rotary is not None:
            cos, sin = rotary_tables(position_ids, self.rotary)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        heads_first = (t.transpose(1, 2) for t in (query, key, value))  # (B, H_local, T, K)
        attended = self.core(*heads_first, visibility, keys)
        merged = attended.transpose(1, 2).flatten(2)  # (B, T, H_local * K)
        return self.output(merged)
