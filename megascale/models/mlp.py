"""The position-wise feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY

ActivationName = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]


def gelu(x: Tensor) -> Tensor:
    """The exact one, by erf."""
    return passes.gelu(x, "gelu") if LIBRARY.takes(x) else F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation."""
    return passes.gelu(x, "gelu_tanh") if LIBRARY.takes(x) else F.gelu(x, approximate="tanh")


# name -> (function, whether it acts on a gate that multiplies the up-projection)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (gelu, False),
    "gelu_tanh": (gelu_tanh, False),
    "swiglu": (F.silu, True),
    "geglu": (gelu, True),
    "geglu_tanh": (gelu_tanh, True),
}


def is_gated(activation: ActivationName) -> bool:
    """Whether the feed-forward layer has a third matrix, the gate."""
    return _ACTIVATIONS[activation][1]


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with a gate (arXiv:2002.05202).

    Args:
        hidden_size: D.
        ffn_hidden_size: F.
        activation: "gelu" (exact, by erf), "gelu_tanh" (GPT-2's approximation), or with a gate
            "swiglu" (silu), "geglu", "geglu_tanh".
        bias: whether the projections have one.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, activation: ActivationName, bias: bool
    ) -> None:
        super().__init__()
        self.activation, gated = _ACTIVATIONS[activation]
        self.up = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.gate: nn.Linear | None = None
        if gated:
            self.gate = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, T, D) -> (B, T, D) through (B, T, F_local)."""
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))
