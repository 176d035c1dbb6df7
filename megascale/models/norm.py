"""Normalisation layers over the last dim."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

NormName = Literal["layernorm", "rmsnorm"]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in fp32 and cast back, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., D) -> (..., D), same dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def build_norm(name: NormName, size: int, eps: float, bias: bool) -> nn.Module:
    """The norm called ``name`` over ``size`` features; ``bias`` concerns LayerNorm only."""
    if name == "rmsnorm":
        return RMSNorm(size, eps)
    return nn.LayerNorm(size, eps=eps, bias=bias)
