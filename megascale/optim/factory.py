"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch

from megascale.errors import UserError

STATE_KEYS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""Optimizer name -> names of its states that have the shape of a parameter, for checkpoints.

SGD without momentum holds none of its own.
"""


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> torch.optim.Optimizer:
    """An optimizer over ``groups`` (of ``param_groups.weight_decay_groups``).

    Args:
        name: "adamw" (decoupled decay, arXiv:1711.05101) or "sgd" (heavy-ball momentum; its decay
            is an L2 term in the gradient).
        groups: parameter groups, each with its weight_decay.
        lr: first learning rate; the schedule sets each group's "lr" before every update.
        betas, eps: of adamw. momentum: of sgd.

    Raises:
        UserError: an unknown name.
    """
    # One tensor after the other: the batched (foreach) path refuses a mix of sharded and plain
    # tensors, and on CPU neither it nor the fused one is what the parity tests compare with.
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if name == "adamw":
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, foreach=False, fused=on_cuda
        )
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, weight_decay=0.0, foreach=False, fused=on_cuda
        )
    raise UserError(
        f"optimizer {name!r}",
        rule=f"an optimizer is one of {', '.join(STATE_KEYS)}",
        remedy="choose one of these for optimizer.name",
    )
