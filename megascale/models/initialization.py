"""Initial values as a function of (seed, parameter name).

Each parameter is drawn from its own generator as the full fp32 tensor on the CPU. Its values
depend neither on the order of construction nor on which other parameters a process holds, so
every layout starts from the same weights: a rank draws one parameter and keeps its slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# The last matrices of the two residual branches: 2 * num_layers of them add up in the residual
# stream, whose variance GPT-2 keeps constant by dividing their spread by sqrt(2 * num_layers).
_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


Part = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""(global shape, half-open interval of each dim): which part of a tensor a process holds."""


def parameter_seed(seed: int, name: str) -> int:
    """A 32-bit seed, the same in every process and version of Python (never ``hash``)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    # torch's CPU generator (mt19937) takes 32 bits of a seed and ignores the rest.
    return int.from_bytes(digest, "little")


def initial_value(
    name: str, shape: Sequence[int], seed: int, *, init_std: float, num_layers: int | None
) -> Tensor:
    """The initial value of one parameter: full tensor, fp32, CPU.

    Matrices are normal with deviation ``init_std``, divided by sqrt(2 * num_layers) where they end
    a residual branch (GPT-2, section 2.3); norm weights are 1, their offsets and biases 0.

    Args:
        name: name in the whole model, without prefixes of wrappers, e.g.
            "layers.3.mlp.down.weight".
        shape: global shape of the parameter.
        seed: the run's seed.
        init_std: standard deviation of matrices.
        num_layers: layers of the whole model; None: the ends of residual branches are as wide as
            the rest (BERT, whose norms come after the sums).

    Raises:
        ValueError: a vector that is neither a bias nor a norm's weight or offset.
    """
    if len(shape) >= 2:
        std = init_std
        if num_layers is not None and name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * num_layers)
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        return torch.empty(*shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    *path, kind = name.split(".")
    if kind == "bias" or (kind == "offset" and path and path[-1].endswith("norm")):
        return torch.zeros(*shape)
    if kind == "weight" and path and path[-1].endswith("norm"):
        return torch.ones(*shape)
    raise ValueError(
        f"no rule for the initial value of {name!r} of shape {tuple(shape)}: a vector is called "
        "'<...>.bias', '<...>norm.weight' or '<...>norm.offset'"
    )


def initialize(
    module: nn.Module,
    seed: int,
    *,
    init_std: float,
    num_layers: int | None,
    prefix: str = "",
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Set every parameter of ``module`` to its :func:`initial_value`, in place.

    Works on any device and dtype, also after ``to_empty`` on a module built on the meta device.

    Args:
        parts: name -> (global shape, half-open interval of each dim) of parameters that this
            process holds only in part.
        prefix: put before the names of ``module``'s parameters, e.g. "head.".
    """
    for name, parameter in module.named_parameters():
        assert not parameter.is_meta, f"{name} is on the meta device: call to_empty first"
        whole = tuple((0, size) for size in parameter.shape)
        shape, box = (parts or {}).get(name, (tuple(parameter.shape), whole))
        value = initial_value(prefix + name, shape, seed, init_std=init_std, num_layers=num_layers)[
            tuple(slice(begin, end) for begin, end in box)
        ]
        with torch.no_grad():
            parameter.copy_(value)
