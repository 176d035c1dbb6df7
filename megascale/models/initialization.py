"""Initial values as a function of (seed, parameter name).

Each parameter is drawn from its own generator as the full fp32 tensor on the CPU. Its values
depend neither on the order of construction nor on which other parameters a process holds, so
every layout starts from the same weights: a rank draws one parameter, block by block, and keeps its
part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The last matrices of the two residual branches: 2 * num_layers of them add up in the residual
# stream, whose variance GPT-2 keeps constant by dividing their spread by sqrt(2 * num_layers).
_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


_BLOCK = 1 << 20  # elements that are drawn at a time
_VECTOR = 16  # torch's generator fills so many at a time


def parameter_seed(seed: int, name: str) -> int:
    """A 32-bit seed, the same in every process and version of Python (never ``hash``)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    # torch's CPU generator (mt19937) takes 32 bits of a seed and ignores the rest.
    return int.from_bytes(digest, "little")


def initial_blocks(
    name: str, shape: Sequence[int], seed: int, *, init_std: float, num_layers: int | None
) -> Iterator[Tensor]:
    """The initial value of one parameter, fp32 on the CPU, a block of rows at a time.

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
    if len(shape) < 2:
        yield torch.full(tuple(shape), _constant(name, shape))
        return
    std = init_std
    if num_layers is not None and name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * num_layers)
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    # whole vectors of the generator: the same numbers as if all were drawn at once
    rows = max(1, _BLOCK // math.prod(shape[1:]) // _VECTOR) * _VECTOR
    count = max(1, shape[0] // rows)
    for index in range(count):
        height = rows if index < count - 1 else shape[0] - rows * (count - 1)
        yield torch.empty(height, *shape[1:]).normal_(0.0, std, generator=generator)


def _constant(name: str, shape: Sequence[int]) -> float:
    *path, kind = name.split(".")
    if kind == "bias" or (kind == "offset" and path and path[-1].endswith("norm")):
        return 0.0
    if kind == "weight" and path and path[-1].endswith("norm"):
        return 1.0
    raise ValueError(
        f"no rule for the initial value of {name!r} of shape {tuple(shape)}: a vector is called "
        "'<...>.bias', '<...>norm.weight' or '<...>norm.offset'"
    )


def fill_initial(
    part: Tensor,
    name: str,
    shape: Sequence[int],
    seed: int,
    *,
    init_std: float,
    num_layers: int | None,
    box: Sequence[tuple[int, int]] | None = None,
    start: int = 0,
) -> None:
    """Set a part of a parameter to its initial value, in place; see :func:`initial_blocks`.

    Holds one block of the parameter beside the part, however large the parameter is.

    Args:
        part: 1-D, of any device and dtype: the elements from `start` on of the flattened box.
        box: half-open interval of each dim; None: the whole parameter.
    """
    first, last = box[0] if box is not None else (0, shape[0])
    inner = tuple(slice(begin, end) for begin, end in box[1:]) if box is not None else ()
    row = at = 0  # in the parameter, in the flattened box
    blocks = initial_blocks(name, shape, seed, init_std=init_std, num_layers=num_layers)
    for block in blocks:
        held = block[max(first - row, 0) : max(last - row, 0)][(slice(None), *inner)].reshape(-1)
        begin, end = max(at, start), min(at + held.numel(), start + part.numel())
        if begin < end:
            part[begin - start : end - start].copy_(held[begin - at : end - at])
        row, at = row + block.shape[0], at + held.numel()
        if at >= start + part.numel():
            return


def initial_value(
    name: str, shape: Sequence[int], seed: int, *, init_std: float, num_layers: int | None
) -> Tensor:
    """The whole initial value of one parameter, fp32 on the CPU; see :func:`initial_blocks`."""
    value = torch.empty(*shape)
    fill_initial(value.view(-1), name, shape, seed, init_std=init_std, num_layers=num_layers)
    return value
