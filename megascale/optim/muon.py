"""Muon for the matrices inside layers, AdamW for everything else, behind one optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW over disjoint groups that share one state and one list of groups.

    Muon (kellerjordan.github.io/posts/muon) orthogonalises the momentum of a whole matrix. Its
    step is scaled to the root mean square of AdamW's (0.2 * sqrt(max(rows, columns)),
    arXiv:2502.16982), so that both parts share one learning rate and one weight decay.

    Args:
        params: groups; those with a true "hidden_matrices" are Muon's and hold matrices only.
        lr: learning rate of both. momentum: Muon's. betas, eps: AdamW's.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        hidden = [group for group in params if group["hidden_matrices"]]
        others = [group for group in params if not group["hidden_matrices"]]
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=lr,
                    weight_decay=0.0,
                    momentum=momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._parts.append(
                torch.optim.AdamW(
                    others, lr=lr, betas=betas, eps=eps, weight_decay=0.0, foreach=False
                )
            )
        # the very dicts of the parts: a learning rate set here is set there
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.state = defaultdict(dict)
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part in self._parts:
            part.step()
