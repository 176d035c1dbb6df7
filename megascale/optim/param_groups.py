"""Which parameters decay, and at which share of the learning rate they learn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    layer_lr_decay: float = 1.0,
    num_layers: int = 0,
    apart: bool = False,
) -> list[dict[str, Any]]:
    """Split parameters into the groups of an optimizer.

    Matrices (ndim >= 2, embeddings among them) decay; biases and norm weights do not. With
    `layer_lr_decay` the learning rate falls from layer to layer towards the input (ULMFiT,
    arXiv:1801.06146): what follows the layers has lr, layer i lr * decay^(num_layers - i), the
    embeddings lr * decay^(num_layers + 1). To be called before an engine flattens the parameters,
    while ndim still tells them apart.

    Args:
        named_parameters: (name, parameter) in module order. Frozen parameters are left out; one
            that comes twice (tied) counts once, under its first name.
        weight_decay: of the decaying groups.
        layer_lr_decay: in (0, 1]; 1 gives all parameters the same rate.
        num_layers: layers of the whole model; needed with layer_lr_decay.
        apart: put the matrices inside layers into groups of their own (Muon).

    Returns:
        Dicts with "params", "names" (same order, that of the module), "weight_decay", "lr_scale"
        and "hidden_matrices", the decaying groups first, groups without parameters left out.
    """
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        decays = parameter.ndim >= 2
        hidden = apart and is_hidden_matrix(name, parameter.ndim)
        scale = layer_lr_decay ** (num_layers + 1 - _depth(name, num_layers))
        group = groups.setdefault(
            (not decays, not hidden, scale),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "hidden_matrices": hidden,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix inside a layer: neither vector, embedding nor head."""
    return ndim == 2 and _LAYER.search(name) is not None


def _depth(name: str, num_layers: int) -> int:
    """0 for embeddings, i + 1 for layer i, num_layers + 1 for what follows the layers."""
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer.group(1)) + 1
    return 0 if "embedding" in name.split(".") else num_layers + 1
