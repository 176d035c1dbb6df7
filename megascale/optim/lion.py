"""Lion: the sign of an interpolated momentum as the update."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675, algorithm 2), elementwise, so right on any shard.

        u = sign(beta1 * m + (1 - beta1) * g);  w -= lr * (u + weight_decay * w)
        m = beta2 * m + (1 - beta2) * g

    Args:
        params: groups, each with its weight_decay.
        lr: learning rate; the paper takes a third to a tenth of AdamW's.
        betas: (beta1, beta2).
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                momentum = state["exp_avg"]
                update = momentum.lerp(grad, 1 - beta1).sign_()
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(update, alpha=group["lr"])
                momentum.lerp_(grad, 1 - beta2)
