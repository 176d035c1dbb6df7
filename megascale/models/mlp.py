"""The position-wise feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY
from megascale.models.activated_linear import ActivatedLinear, ActivatedProduct, Recompute
from megascale.models.linear import Linear

ActivationName = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]


@dataclass(frozen=True)
class Gelu:
    """The exact one, by erf, or GPT-2's approximation, by tanh."""

    name: passes.GeluName

    def __call__(self, x: Tensor) -> Tensor:
        """Of any shape."""
        if LIBRARY.takes(x):
            return passes.gelu(x, self.name)
        return F.gelu(x, approximate="tanh" if self.name == "gelu_tanh" else "none")

    def again_(self, x: Tensor, grad: Tensor) -> Tensor | None:
        """See `Reentrant.again_`."""
        if LIBRARY.takes(x) and x.is_contiguous() and grad.is_contiguous():
            return passes.gelu_again_(x, grad, self.name)
        return None


gelu, gelu_tanh = Gelu("gelu"), Gelu("gelu_tanh")


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, gate: Tensor) -> Tensor:
        return function(gate) * x

    return product


_PLAIN: dict[str, Gelu] = {"gelu": gelu, "gelu_tanh": gelu_tanh}
_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": _gated(F.silu),
    "geglu": _gated(gelu),
    "geglu_tanh": _gated(gelu_tanh),
}


def is_gated(activation: ActivationName) -> bool:
    """Whether the feed-forward layer has a third matrix, the gate."""
    return activation in _GATED


class MLP(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with a gate (arXiv:2002.05202).

    Args:
        hidden_size: D.
        ffn_hidden_size: F.
        activation: "gelu" (exact, by erf), "gelu_tanh" (GPT-2's approximation), or with a gate
            "swiglu" (silu), "geglu", "geglu_tanh".
        bias: whether the projections have one.
        recompute: of the activation, see ActivatedProduct.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: ActivationName,
        bias: bool,
        recompute: Recompute = "auto",
    ) -> None:
        super().__init__()
        self.up = Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.gate: Linear | None = None
        if is_gated(activation):
            self.gate = Linear(hidden_size, ffn_hidden_size, bias=bias)
        product = ActivatedProduct((_PLAIN | _GATED)[activation], recompute)
        self.down = ActivatedLinear(ffn_hidden_size, hidden_size, bias, product)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, T, D) -> (B, T, D) through (B, T, F_local)."""
        if self.gate is None:
            return self.down(self.up(x))
        gate = self.gate(x)
        return self.down(self.up(x), gate)
