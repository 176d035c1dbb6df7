"""Initial weights of a module that no engine holds."""

from __future__ import annotations

from torch import nn

from megascale.models.initialization import fill_initial


def initialize(
    module: nn.Module, seed: int, *, init_std: float, num_layers: int | None, prefix: str = ""
) -> None:
    """Set every parameter to its initial value; `prefix` is put before its name."""
    for name, parameter in module.named_parameters():
        fill_initial(
            parameter.detach().view(-1),
            prefix + name,
            parameter.shape,
            seed,
            init_std=init_std,
            num_layers=num_layers,
        )
