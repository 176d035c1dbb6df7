"""Rotary position embedding (arXiv:2104.09864) in Llama's half-rotation convention.

Feature i of a head is paired with feature i + K/2. The tables are computed from the position ids
where they are used: nothing is cached, so a model built on the meta device or moved between
devices has no stale buffer, and no engine can cast a table to half precision on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, fp32.

    Args:
        position_ids: (B, T) or (1, T) integers.
        head_dim: K, even.
        theta: base of the frequencies; frequency i is theta ** (-2i / K).

    Returns:
        cos and sin, each (B, T, 1, K/2).
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    frequencies = 1.0 / (theta**exponents)  # (K/2,)
    angles = position_ids[..., None, None].float() * frequencies  # (B, T, 1, K/2)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (B, T, H, K) by the tables of :func:`rotary_tables`, in fp32; same dtype out."""
    first, second = x.float().chunk(2, dim=-1)  # each (B, T, H, K/2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
