"""Attention whose scores never leave the caches, where it is compiled (kernels/attention.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY

if TYPE_CHECKING:
    from megascale.models.attention import Visibility

_LANES = 16


def compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float
) -> Tensor | None:
    """``query`` (B, H, T, K), ``key`` and ``value`` (B, H_kv, T, K) -> (B, H, T, K); None where it
    does not apply: other types than bf16, processors without products of bf16, heads that do not
    fill its vectors or are fewer than the threads, and keys that are seen with gaps.
    """
    heads = key.shape[0] * key.shape[1]
    if query.shape[-1] % _LANES or heads < torch.get_num_threads():
        return None
    if not LIBRARY.multiplies(query):
        return None
    seen = visibility.intervals(query.shape[2])
    return None if seen is None else _CompiledAttention.apply(query, key, value, seen, scale)


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
    ) -> Tensor:
        query, key, value = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)
        )
        out, norms = passes.attention(query, key, value, seen, scale)
        ctx.save_for_backward(query, key, value, out, norms, seen)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *tensors, norms, seen = ctx.saved_tensors
        grads = passes.attention_backward(grad, tuple(tensors), norms, seen, ctx.scale)
        return *grads, None, None
