"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megascale.errors import UserError
from megascale.optim.lamb import Lamb
from megascale.optim.lion import Lion
from megascale.optim.muon import MuonWithAdamW
from megascale.optim.param_groups import is_hidden_matrix

Groups = list[dict[str, Any]]
Sum = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor] | None

STATE_KEYS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "adafactor": ("row_var", "col_var", "variance"),
    "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
}
"""Optimizer name -> names of its tensor states, for checkpoints.

SGD without momentum holds none of its own. A parameter has those of `state_shapes` only.
"""

COUNTS_STEPS: tuple[str, ...] = ("adamw", "lamb", "adafactor", "muon")
"""The optimizers that also keep the number of updates as a scalar "step"."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of an update rule; each rule reads its own.

    Attributes:
        name: one of STATE_KEYS.
        lr: first learning rate; the schedule sets each group's "lr" before every update.
        betas, eps: of adamw, lamb and muon's AdamW; betas of lion too.
        momentum: of sgd and muon.
        fused: whether adamw and sgd update a tensor in one pass over its state, in torch's fused
            kernels of the device, instead of a pass for each operation.
    """

    name: str
    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    fused: bool = True


def build_optimizer(
    settings: OptimizerSettings,
    groups: Groups,
    sum_over_shards: Sum = None,
) -> torch.optim.Optimizer:
    """An optimizer over ``groups`` (of ``param_groups.parameter_groups``).

    - adamw: decoupled decay (arXiv:1711.05101).
    - sgd: heavy-ball momentum; its decay is an L2 term in the gradient.
    - lion, lamb, muon: see their modules.
    - adafactor: torch's (arXiv:1804.04235), with the relative step min(lr, 1/sqrt(step)) times
      the parameter's root mean square.

    Args:
        groups: parameter groups, each with its weight_decay.
        sum_over_shards: for lamb over shards; see `Lamb`.

    Raises:
        UserError: an unknown name.
    """
    build = _BUILDERS.get(settings.name)
    if build is None:
        raise UserError(
            f"optimizer {settings.name!r}",
            rule=f"an optimizer is one of {', '.join(STATE_KEYS)}",
            remedy="choose one of these for optimizer.name",
        )
    return build(settings, groups, sum_over_shards)


def state_shapes(optimizer: str, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensor states of one parameter and their shapes.

    Args:
        optimizer: its name. name, shape: the parameter's.
    """
    if optimizer == "adafactor":
        if len(shape) == 1:
            return {"variance": shape}
        return {
            "row_var": (*shape[:-1], 1),
            "col_var": (*shape[:-2], 1, shape[-1]),
        }
    if optimizer == "muon":
        keys = ("momentum_buffer",) if is_hidden_matrix(name, len(shape)) else STATE_KEYS["adamw"]
        return dict.fromkeys(keys, shape)
    return dict.fromkeys(STATE_KEYS[optimizer], shape)


# Never torch's batched (foreach) path: it refuses a mix of sharded and plain tensors.


def _adamw(settings: OptimizerSettings, groups: Groups, _: Sum) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=0.0,
        foreach=False,
        fused=settings.fused,
    )


def _sgd(settings: OptimizerSettings, groups: Groups, _: Sum) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=0.0,
        foreach=False,
        fused=settings.fused,
    )


def _lion(settings: OptimizerSettings, groups: Groups, _: Sum) -> torch.optim.Optimizer:
    return Lion(groups, settings.lr, settings.betas)


def _lamb(settings: OptimizerSettings, groups: Groups, total: Sum) -> torch.optim.Optimizer:
    return Lamb(groups, settings.lr, settings.betas, settings.eps, total)


def _adafactor(settings: OptimizerSettings, groups: Groups, _: Sum) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=settings.lr, weight_decay=0.0, foreach=False)


def _muon(settings: OptimizerSettings, groups: Groups, _: Sum) -> torch.optim.Optimizer:
    return MuonWithAdamW(groups, settings.lr, settings.momentum, settings.betas, settings.eps)


_BUILDERS: dict[str, Callable[[OptimizerSettings, Groups, Sum], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "lamb": _lamb,
    "adafactor": _adafactor,
    "muon": _muon,
}
