"""Linear layers whose parameters' gradients go straight to where an engine adds them up.

Autograd would hand on the weight's gradient in the weight's type, to be read, widened and added to
the main gradient, and walk over the output's gradient once more for the bias. Where parameters
have sinks (`gradient_sink.py`) one compiled product does all three, in fp32 from the first sum to
the last: what Megatron calls gradient accumulation fusion. The layer's other two products are
compiled there, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megascale.kernels import passes
from megascale.models.gradient_sink import GradientSink, sink_of


class Linear(nn.Linear):
    """nn.Linear that adds to the sinks of its parameters, where they have any."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: (..., I), (O, I), (O,) -> (..., O)."""
    if torch.is_grad_enabled() and sink_of(weight) is not None and x.dim() > 1:
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = Products(weight, bias)
        return ctx.products.output(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = ctx.products.input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        return of_x, *ctx.products.gradients(grad, x, *ctx.needs_input_grad[1:])


class Products:
    """The three products of a linear layer, and where the gradients of its parameters go.

    Args:
        weight: (O, I). bias: (O,) or None; has a sink if the weight has one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = sink_of(weight)
        self._bias = None if bias is None else sink_of(bias)
        self._compiled = self._weight is not None and passes.multiplies(weight)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: (..., I) -> (..., O)."""
        if not self._compiled:
            return F.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], len(weight))
        passes.product_(_rows(x), weight.t(), out.flatten(0, -2), bias)
        return out

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad @ weight``: (..., O) -> (..., I)."""
        if not self._compiled:
            return grad @ weight
        out = grad.new_empty(*grad.shape[:-1], weight.shape[1])
        passes.product_(_rows(grad), weight, out.flatten(0, -2))
        return out

    def gradients(
        self, grad: Tensor, x: Tensor, of_weight: bool = True, of_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias, from the output's (..., O) and the input (..., I).

        Args:
            of_weight, of_bias: whether they are wanted.

        Returns:
            What autograd is to hand on; None where it was not wanted or went to the sinks, which
            get both or none.
        """
        if not (of_weight or of_bias):
            return None, None
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        if self._weight is None:
            return rows.t() @ inputs if of_weight else None, rows.sum(0) if of_bias else None
        total, fresh = _place(self._weight)
        sums, fresh_sums = (None, True) if self._bias is None else _place(self._bias)
        passes.weight_gradient_(rows, inputs, total, not fresh, sums, not fresh_sums)
        return None, None


def _rows(values: Tensor) -> Tensor:
    rows = values.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _place(sink: GradientSink) -> tuple[Tensor, bool]:
    """A main gradient, and whether it holds anything instead of numbers."""
    place = sink.claim()
    return (sink.numbers(), False) if place is None else (place, True)
