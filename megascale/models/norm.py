"""Normalisation layers over the last dim."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from megascale.wide import widen

NormName = Literal["layernorm", "rmsnorm"]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in fp32 and cast back, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., D) -> (..., D), same dtype."""
        wide = widen(x)
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm that multiplies by ``1 + offset``, in fp32 until the end, as in Gemma.

    The parameter has a name of its own: it starts at 0, and weights of the other kind can never
    be taken for it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., D) -> (..., D), same dtype."""
        wide = widen(x)
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (scaled * (1.0 + widen(self.offset))).to(x.dtype)


def build_norm(
    name: NormName, size: int, eps: float, bias: bool, unit_offset: bool = False
) -> nn.Module:
    """The norm called ``name`` over ``size`` features; ``bias`` concerns LayerNorm only and
    ``unit_offset`` (multiply by 1 + weight) RMSNorm only.
    """
    if name == "rmsnorm":
        return OffsetRMSNorm(size, eps) if unit_offset else RMSNorm(size, eps)
    return nn.LayerNorm(size, eps=eps, bias=bias)
