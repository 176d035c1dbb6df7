"""The type for sums: at least fp32, and fp64 where the values are.

Norms, softmaxes, losses, gradients and master weights are kept in this type. In fp64 all of a
training is exact to some 1e-15, so that whatever two layouts differ by is no rounding: `megascale
verify layout` decides with it.
"""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp16, bf16 and fp32; fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def widen(values: torch.Tensor) -> torch.Tensor:
    """`values` in their `wide_dtype`; the same tensor where that is its own."""
    return values.to(wide_dtype(values.dtype))
