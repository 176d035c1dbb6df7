"""Global gradient norm and clipping over whatever shards a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_of_squares(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squared elements over `gradients`, as an fp64 scalar (fp64: thousands of terms)."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    return norms.double().square().sum()


def global_norm(
    gradients: Sequence[torch.Tensor], device: torch.device, groups: Sequence[dist.ProcessGroup]
) -> float:
    """L2 norm over the parts of the gradient that the ranks of all `groups` hold.

    The groups are axes of the mesh. Each element must be given by exactly one rank of their
    product (no groups: by this rank alone).
    """
    squares = sum_of_squares(gradients, device)
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt().item()


def clip_(gradients: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale `gradients` in place so that their global norm is at most `max_norm` (0: never)."""
    factor = clip_factor(norm, max_norm)
    if factor != 1.0 and gradients:
        torch._foreach_mul_(list(gradients), factor)


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this global norm are multiplied with; see `clip_`."""
    return max_norm / (norm + 1e-6) if 0 < max_norm < norm else 1.0
