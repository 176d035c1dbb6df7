"""AdamW's update with the clipping before it and the rounding after it, one pass over the memory.

An update reads and writes 28 bytes of a parameter's fp32 state; to scale its gradient first takes 8
more and to round the result to bf16 another 6, which one compiled pass has in its registers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY


class OnePassAdamW:
    """The update of an AdamW of torch whose parameters are fp32 masters of bf16 weights.

    Groups and state stay the optimizer's, as its own step would leave them.

    Args:
        optimizer: see `of`.
        weights: master -> weight of its shape.
    """

    def __init__(self, optimizer: torch.optim.AdamW, weights: Mapping[Tensor, Tensor]) -> None:
        self._optimizer, self._weights = optimizer, dict(weights)

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, weights: Mapping[Tensor, Tensor]
    ) -> OnePassAdamW | None:
        """What takes the place of the optimizer's own step; None where it is not a fused AdamW
        (arXiv:1711.05101) of weights that go to compiled functions."""
        if type(optimizer) is not torch.optim.AdamW:
            return None
        usual = all(g["fused"] and not g["amsgrad"] for g in optimizer.param_groups)
        fits = usual and all(
            weight.dtype == torch.bfloat16
            and LIBRARY.takes(weight)
            and weight.is_contiguous()
            and master.dtype == torch.float32
            and master.is_contiguous()
            for master, weight in weights.items()
        )
        return cls(optimizer, weights) if fits else None

    def step(self, gradients: Mapping[Tensor, Tensor], factor: float) -> None:
        """Update all masters and weights.

        Args:
            gradients: of the masters, contiguous. factor: of all of them.
        """
        for group in self._optimizer.param_groups:
            for master in group["params"]:
                state = self._optimizer.state[master]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(master)
                    state["exp_avg_sq"] = torch.zeros_like(master)
                state["step"] += 1
                self._update(group, state, master, gradients[master], factor)

    def _update(
        self,
        group: dict[str, Any],
        state: dict[str, Tensor],
        master: Tensor,
        gradient: Tensor,
        factor: float,
    ) -> None:
        lr, decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
        betas = tuple(float(beta) for beta in group["betas"])
        first, second = (1.0 - beta ** state["step"].item() for beta in betas)
        remainders = (1.0 - beta for beta in betas)  # not in fp32, which has few digits of them
        passes.adamw_(
            master.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient,
            self._weights[master].detach(),
            (factor, 1.0 - lr * decay, *remainders, lr / first, math.sqrt(second), eps),
        )
