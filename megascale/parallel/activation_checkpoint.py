"""Activation recomputation: memory of the backward bought with a second forward.

    none        everything is kept
    selective   attention's scores and probabilities are computed again (arXiv:2205.05198, 5)
    full        only each layer's input is kept (arXiv:1604.06174)

The recomputed forward is the same arithmetic (dropout masks are functions of the sample, not of a
generator), so losses and gradients do not change by a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

Mode = Literal["none", "selective", "full"]
SELECTIVE = "attention.core"
"""The part of a block that the selective mode computes again."""


def recompute(blocks: Iterable[nn.Module], mode: Mode) -> None:
    """Switch recomputation on for the repeated layers of a model, in place.

    Names of modules and parameters do not change: only `forward` is wrapped.
    """
    if mode == "none":
        return
    for block in blocks:
        target = block if mode == "full" else block.get_submodule(SELECTIVE)
        target.forward = _checkpointed(target.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # preserve_rng_state: no part of a model draws from a generator
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed
