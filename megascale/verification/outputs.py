"""What each module puts out, as two means that no layout changes.

The mean and the mean square over all elements, samples, ranks and passes of a step are the same
whether a tensor is whole on each rank, cut over the ranks in any way, or computed twice. So the
first module, in the order of the forward, whose means are not those of the single process is the
one where a forward goes wrong; what came before it agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Sums = list[float]
"""Number of elements, their sum, the sum of their squares."""


class OutputSums:
    """Sums over the outputs of every module of a rank.

    Attributes:
        sums: module name -> sums, in the order in which modules first finished.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Add up what the modules inside `module` put out."""
        # a module that holds the layers ends elsewhere on each pipeline rank
        named = [(n, m) for n, m in module.named_modules() if not _holds_layers(m)]
        hooks = [child.register_forward_hook(self._hook(name)) for name, child in named]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(_: nn.Module, args: Any, out: Any) -> None:
            # What a backward computes again counts once: where a schedule splits backwards, some
            # micro-batches are computed more often than others.
            if torch._C._current_graph_task_id() != -1:  # inside of a backward
                return
            # a scalar is a sum over tokens (a head that is one with its loss), cut like these
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.dim():
                wide = out.detach().double()
                sums = self.sums.setdefault(name, [0.0, 0.0, 0.0])
                new = (out.numel(), wide.sum().item(), wide.square().sum().item())
                self.sums[name] = [old + more for old, more in zip(sums, new, strict=True)]

        return add


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.ModuleDict, nn.ModuleList)) for part in module.modules())


def pooled(ranks: Iterable[Mapping[str, Sums]]) -> dict[str, tuple[float, float]]:
    """Module name -> (mean, root mean square) over all ranks, in the order of the forward."""
    totals: dict[str, Sums] = {}
    for rank in ranks:
        for name, sums in rank.items():
            before = totals.setdefault(name, [0.0, 0.0, 0.0])
            totals[name] = [old + more for old, more in zip(before, sums, strict=True)]
    return {
        name: (total / count, (squares / count) ** 0.5)
        for name, (count, total, squares) in totals.items()
        if count
    }
