"""Self-attention, causal or bidirectional, with grouped key and value heads.

The number of heads is read from the width of a projection's output, so that a model whose
projections were cut along the heads (tensor parallelism) runs through the same lines.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.models.dropout import CounterDropout
from megascale.models.rotary import Rotary, apply_rotary, rotary_tables


def causal_mask(length: int, device: torch.device) -> Tensor:
    """``(T, T)`` bool: query i sees keys 0..i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def causal_document_mask(document_ids: Tensor) -> Tensor:
    """``(B, 1, T, T)`` bool: query i sees the keys 0..i of its own document.

    Args:
        document_ids: (B, T) integers, equal within a document of a packed sample.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
    return same & causal_mask(document_ids.shape[1], document_ids.device)


def windowed(mask: Tensor | None, window: int, length: int, device: torch.device) -> Tensor | None:
    """``mask`` without the keys that are ``window`` or more positions back (arXiv:2310.06825).

    None still means causal: a window that reaches over the whole sequence changes nothing.
    """
    if window >= length:
        return mask
    near = torch.ones(length, length, dtype=torch.bool, device=device).triu(1 - window)
    return near & (causal_mask(length, device) if mask is None else mask)


def padding_mask(attention_mask: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """``(B, 1, 1 or T, T)`` bool: every query sees the real keys, those of its document only.

    Args:
        attention_mask: (B, T), 0 at padding and 1 elsewhere.
        document_ids: (B, T) integers; None: the whole sample is one document. With them every
            query also sees itself, so that padding with an id of its own has a key to look at.
    """
    real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
    if document_ids is None:
        return real
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
    itself = torch.eye(document_ids.shape[1], dtype=torch.bool, device=document_ids.device)
    return same & real | itself


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V with dropout on the probabilities; no parameters.

    Without active dropout this is torch's fused scaled_dot_product_attention. With it the
    probabilities must exist, because their mask is a function of the sample and not of a
    generator: softmax in fp32, mask over the sample's (H, T, T). A soft-cap needs the scores, too.

    Args:
        dropout: probability for the attention probabilities. dropout_site: see CounterDropout.
        softcap: bound c of the scores, which become c * tanh(score / c); None for none.
        query_scaling: what stands for K under the square root; None for K.
        causal: whether a query sees only the keys up to its own where no mask is given.
    """

    def __init__(
        self,
        dropout: float,
        dropout_site: int,
        softcap: float | None = None,
        query_scaling: float | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.dropout = CounterDropout(dropout, dropout_site)
        self.softcap, self.query_scaling = softcap, query_scaling

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, H, T, K). key, value: (B, H_kv, T, K) with H_kv dividing H.
            mask: (B, 1, T or 1, T) bool, True where a query sees a key; None means causal, or all
                keys when not ``causal``.
            keys: (B,) dropout keys of the samples.

        Returns:
            (B, H, T, K).
        """
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Repeated here and not by enable_gqa, which some fused kernels answer by falling back
            # to the one that keeps all T x T scores.
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        if self.softcap is None and not (self.training and self.dropout.p > 0):
            scale = None if self.query_scaling is None else 1 / math.sqrt(self.query_scaling)
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=self.causal and mask is None,
                scale=scale,
            )
        if mask is None and self.causal:
            mask = causal_mask(query.shape[2], query.device)
        root = math.sqrt(self.query_scaling or query.shape[-1])
        scores = query @ key.transpose(-1, -2) / root  # (B, H, T, T)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.float()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        probabilities = self.dropout(scores.softmax(dim=-1), keys)
        return probabilities.to(value.dtype) @ value


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
        dropout, dropout_site, softcap, query_scaling, causal: see CoreAttention.
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
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary = head_dim, rotary
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.query_norm, self.key_norm = query_norm, key_norm
        self.core = CoreAttention(dropout, dropout_site, softcap, query_scaling, causal)

    def forward(
        self, x: Tensor, position_ids: Tensor, mask: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """``x`` (B, T, D), ``position_ids`` (B or 1, T), ``mask`` (B, 1, T, T), ``keys`` (B,)
        -> (B, T, D).
        """
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
        attended = self.core(*heads_first, mask, keys)
        merged = attended.transpose(1, 2).flatten(2)  # (B, T, H_local * K)
        return self.output(merged)
