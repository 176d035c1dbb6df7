"""Gradients that operations add up themselves, where a parameter has a place for them.

Autograd hands on a gradient whole and in the parameter's type: for a vocabulary's table, which has
most of a small model's parameters, that is a rounding to bf16, zeros for every word that does not
occur, and a pass over all of it for each. An engine that keeps its main gradients in place may
attach a sink to such a parameter; the operations that know it (the token embedding, the fused
loss, and where there are compiled products linear layers) add to it in their backward and tell
autograd that there is nothing.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class GradientSink(Protocol):
    """The main gradient of a parameter, in the wide dtype and the parameter's shape."""

    def claim(self) -> Tensor | None:
        """Its place, holding anything, if nothing has come in this step; the caller fills it
        before any other operation of the step adds to it. None: it has numbers."""
        ...

    def numbers(self) -> Tensor:
        """It, to be added to."""
        ...


def attach_sink(param: nn.Parameter, sink: GradientSink) -> None:
    """Give a parameter a sink."""
    param.megascale_sink = sink  # type: ignore[attr-defined]


def detach_sink(param: nn.Parameter) -> None:
    """Take it away: autograd hands the parameter's gradient on again."""
    if sink_of(param) is not None:
        del param.megascale_sink  # type: ignore[attr-defined]


def sink_of(param: Tensor) -> GradientSink | None:
    """The parameter's sink, if it has one."""
    return getattr(param, "megascale_sink", None)
