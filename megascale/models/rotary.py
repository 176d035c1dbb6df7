"""Rotary position embedding (arXiv:2104.09864) in Llama's half-rotation convention.

Feature i of the rotated features is paired with feature i + width/2. The tables are computed from
the position ids where they are used: nothing is cached, so a model built on the meta device or
moved between devices has no stale buffer, and no engine can cast a table to half precision on its
way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megascale.wide import widen

RopeScalingName = Literal["none", "linear", "llama3"]


@dataclass(frozen=True)
class Rotary:
    """How the heads of one layer are rotated.

    Attributes:
        theta: base of the frequencies; frequency i is theta ** (-2i / width).
        width: features of a head that are rotated, from the first on; even.
        scaling: how frequencies are lowered for texts longer than the model began with: "linear"
            divides all by `factor` (arXiv:2306.15595), "llama3" only low ones (arXiv:2407.21783).
        factor: see scaling.
        low_freq_factor, high_freq_factor: llama3: wavelengths above original_length /
            low_freq_factor are lowered in full, those below original_length / high_freq_factor not.
        original_length: llama3: tokens of a sample before stretching.
    """

    theta: float
    width: int
    scaling: RopeScalingName = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


def _llama3(frequencies: Tensor, rotary: Rotary) -> Tensor:
    """Long wavelengths stretched in full, short ones not, a linear passage between."""
    turns = rotary.original_length * frequencies / (2 * math.pi)  # within the original length
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rotary.factor + kept * frequencies


def rotary_frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, fp32, (width/2,)."""
    exponents = torch.arange(0, rotary.width, 2, device=device).float() / rotary.width
    frequencies = 1.0 / (rotary.theta**exponents)
    if rotary.scaling == "linear":
        return frequencies / rotary.factor
    return _llama3(frequencies, rotary) if rotary.scaling == "llama3" else frequencies


def rotary_tables(position_ids: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, fp32.

    Args:
        position_ids: (B, T) or (1, T) integers.
        rotary: the layer's rotation.

    Returns:
        cos and sin, each (B, T, 1, width/2).
    """
    frequencies = rotary_frequencies(rotary, position_ids.device)
    angles = position_ids[..., None, None].float() * frequencies  # (B, T, 1, width/2)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first features of ``x`` (B, T, H, K) by the tables of :func:`rotary_tables`, in
    fp32; the others stay as they are; same dtype out.
    """
    width = 2 * cos.shape[-1]
    first, second = widen(x[..., :width]).chunk(2, dim=-1)  # each (B, T, H, width/2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
