"""A linear layer together with the activation in front of it, whose result need not be kept.

The weight's gradient needs the activation's result, the activation's own gradient what went in:
autograd keeps both, and with a gate the activated gate, too. Here only what went in is kept, and
the backward computes the rest again, which is one pass over it: of the 16 B T D elements that a
layer of GPT-2 keeps 4 B T D fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascale.models.linear import Linear, Products, linear

Recompute = Literal["auto", "always", "never"]


@runtime_checkable
class Reentrant(Protocol):
    """An activation of one tensor that gives its result and its gradient in one pass."""

    def again_(self, x: Tensor, grad: Tensor, /) -> Tensor | None:
        """The activation of `x`, while its gradient becomes that of `x` in place; None, and nothing
        done, where it cannot."""
        ...


@dataclass(frozen=True)
class ActivatedProduct:
    """``activation(*inputs) @ weight.T + bias``.

    Attributes:
        activation: elementwise, of one tensor or of several of one shape.
        recompute: whether the backward computes it again; auto: on CPU.
    """

    activation: Callable[..., Tensor]
    recompute: Recompute = "auto"

    def __call__(self, weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
        """``weight`` (O, F), ``bias`` (O,), ``inputs`` (..., F) -> (..., O)."""
        if self.recompute == "always" or (self.recompute == "auto" and weight.device.type == "cpu"):
            return _Product.apply(self.activation, weight, bias, *inputs)
        return linear(self.activation(*inputs), weight, bias)


class ActivatedLinear(Linear):
    """Linear of what an activation makes of its inputs; see `ActivatedProduct`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, product: ActivatedProduct
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product = product

    def forward(self, *inputs: Tensor) -> Tensor:
        """(..., in_features) each -> (..., out_features)."""
        return self.product(self.weight, self.bias, *inputs)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Callable[..., Tensor],
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, *inputs)
        ctx.activation, ctx.products = activation, Products(weight, bias)
        return ctx.products.output(activation(*inputs), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, of_weight, of_bias, *of_inputs = ctx.needs_input_grad
        of_activated = ctx.products.input_gradient(grad, weight) if any(of_inputs) else None
        activated, found = _again(ctx.activation, inputs, of_inputs, of_activated)
        return None, *ctx.products.gradients(grad, activated, of_weight, of_bias), *found


def _again(
    activation: Callable[..., Tensor],
    inputs: list[Tensor],
    wanted: list[bool],
    of_activated: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The activation of the inputs, and the gradients of those for which it is wanted.

    Args:
        of_activated: the result's gradient, which is used up; None where no other is wanted.
    """
    if isinstance(activation, Reentrant) and of_activated is not None:
        (x,) = inputs
        activated = activation.again_(x, of_activated)
        if activated is not None:
            return activated, [of_activated]
    with torch.enable_grad():
        own = [t.detach().requires_grad_(n) for t, n in zip(inputs, wanted, strict=True)]
        activated = activation(*own)
    needed = [t for t in own if t.requires_grad]
    found = iter(torch.autograd.grad(activated, needed, of_activated) if needed else ())
    return activated.detach(), [next(found) if t.requires_grad else None for t in own]
