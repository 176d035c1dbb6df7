"""The position-wise feed-forward network."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ActivationName = Literal["gelu", "gelu_tanh", "swiglu"]


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` for swiglu (arXiv:2002.05202).

    Args:
        hidden_size: D.
        ffn_hidden_size: F.
        activation: "gelu" (exact, by erf), "gelu_tanh" (GPT-2's approximation) or "swiglu".
        bias: whether the projections have one.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, activation: ActivationName, bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.gate: nn.Linear | None = None
        if activation == "swiglu":
            self.gate = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, T, D) -> (B, T, D) through (B, T, F_local)."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(F.gelu(self.up(x), approximate=approximate))
