"""LAMB: Adam with one trust ratio a matrix, for very large batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv:1904.00962, algorithm 2), also over shards of the parameters.

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w;  w -= lr * (|w| / |u|) * u

    with bias-corrected moments. |w| and |u| are the norms of whole matrices: where a rank holds
    shards, the squares of all of them are summed in one all-reduce a step. Vectors (biases, norm
    weights) take Adam's step, as in the authors' code, which excludes them from the adaptation.

    Args:
        params: groups, each with its weight_decay; the same tensors in the same order on every
            rank, possibly empty shards.
        lr: learning rate. betas, eps: as Adam's.
        sum_over_shards: (values, tensors) -> values summed over the ranks that hold parts of
            the parameters `tensors`, over which the last dim of `values` runs; None: all are
            whole.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        sum_over_shards: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._sum_over_shards = sum_over_shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        updates = [
            (param, self._direction(param, group), group["lr"])
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        matrices = [(param, update) for param, update, _ in updates if param.ndim >= 2]
        ratios = iter(self._trust_ratios(matrices))
        for param, update, lr in updates:
            ratio = next(ratios) if param.ndim >= 2 else 1.0
            param.sub_(update, alpha=lr * ratio)

    def _direction(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Adam's bias-corrected step plus the decay, of the parameter's shape."""
        assert param.grad is not None
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state.setdefault("step", torch.tensor(0.0))
        state["step"] += 1
        steps = state["step"].item()
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(param.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**steps)).div_(root)
        return update.add_(param, alpha=group["weight_decay"])

    def _trust_ratios(self, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """|w| / |u| of each matrix, 1 where either norm is 0."""
        if not matrices:
            return []
        weights, updates = ([pair[i] for pair in matrices] for i in (0, 1))
        norms = torch.stack(
            [torch.stack(torch._foreach_norm(part)) for part in (weights, updates)]
        ).double()  # (2, number of matrices)
        if self._sum_over_shards is not None:
            norms = self._sum_over_shards(norms.square(), weights).sqrt()
        weight_norms, update_norms = norms
        known = (weight_norms > 0) & (update_norms > 0)
        return torch.where(known, weight_norms / update_norms, 1.0).tolist()
