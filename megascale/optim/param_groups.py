"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def weight_decay_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into a decaying and a non-decaying group for an optimizer.

    Matrices (ndim >= 2, embeddings among them) decay; biases and norm weights do not. To be called
    before an engine flattens or shards the parameters, while ndim still tells them apart.

    Args:
        named_parameters: (name, parameter) in module order. Frozen parameters are left out; one
            that comes twice (tied) counts once, under its first name.
        weight_decay: of the decaying group.

    Returns:
        One or two dicts with "params", "names" (same order, that of the module) and
        "weight_decay". A group without parameters is dropped.
    """
    decaying: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        group = decaying if parameter.ndim >= 2 else plain
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decaying, plain) if group["params"]]
