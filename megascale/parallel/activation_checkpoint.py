"""Activation recomputation: memory of the backward bought with a second forward.

    none        everything is kept
    selective   attention's scores and probabilities are computed again (arXiv:2205.05198, 5)
    full        only each layer's input is kept (arXiv:1604.06174)
    offload     as full, and the input waits in host memory

The recomputed forward is the same arithmetic (dropout masks are functions of the sample, not of a
generator), so losses and gradients do not change by a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Mode = Literal["none", "selective", "full", "offload"]
SELECTIVE = "attention.core"
"""The part of a block that the selective mode computes again."""


def recompute(blocks: Iterable[nn.Module], modes: Iterable[Mode]) -> None:
    """Switch recomputation on for the repeated layers of a model, each in its mode, in place.

    Names of modules and parameters do not change: only `forward` is wrapped.
    """
    for block, mode in zip(blocks, modes, strict=True):
        if mode != "none":
            target = _target(block, mode)
            target.forward = _checkpointed(target.forward, offloads=mode == "offload")


@contextmanager
def recomputing(block: nn.Module, mode: Mode) -> Iterator[None]:
    """The same for a while, on a block without recomputation."""
    recompute([block], [mode])
    try:
        yield
    finally:
        vars(_target(block, mode)).pop("forward", None)


def _target(block: nn.Module, mode: Mode) -> nn.Module:
    return block.get_submodule(SELECTIVE) if mode == "selective" else block


def _checkpointed(forward: Callable[..., Any], offloads: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device = hidden.device.type
        saving = save_on_cpu(device != "cpu", device) if offloads else nullcontext()
        with saving:  # of what the checkpoint saves: its inputs
            # preserve_rng_state: no part of a model draws from a generator
            return checkpoint(
                forward, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    return recomputed
