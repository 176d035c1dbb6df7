"""Dropout whose mask is arithmetic: the same for a sample in every layout.

A mask element is a pure function of (key of the sample, site, index of the element in the
sample's global tensor). It does not depend on the batch a sample travels in, on how the tensor is
cut over ranks, or on what was drawn before, so that a recomputed layer sees its mask again and a
run with dropout is the same training in every layout. The idea of counter-based generators is
that of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11); the hash is the
finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY

# A keep decision takes the upper 53 bits of the hash: they compare exactly with p * 2**53.
_DECISION_BITS = 53


def _signed64(value: int) -> int:
    """The int64 with the same 64 low bits as ``value`` (any Python int)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_INCREMENT = _signed64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed64(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically, so the sign's copies are masked."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """One output of SplitMix64 for each int64 state in ``value`` (any shape, wrapping int64)."""
    value = value + _INCREMENT
    value = value.bitwise_xor_(_shift_right(value, 30)).mul_(_MULTIPLIER_1)
    value = value.bitwise_xor_(_shift_right(value, 27)).mul_(_MULTIPLIER_2)
    return value.bitwise_xor_(_shift_right(value, 31))


def sample_keys(seed: int, sample_ids: Tensor) -> Tensor:
    """The dropout key of each sample: ``(B,) int64`` from a run's seed and global sample ids.

    Args:
        seed: any int; the run's seed.
        sample_ids: ``(B,)`` integers, each the number of a sample in the run's global order (so
            that a document which comes again in a later epoch gets other masks).
    """
    ids = sample_ids.to(torch.int64)
    salt = torch.full((), _signed64(seed), dtype=torch.int64, device=ids.device)
    return splitmix64(ids ^ splitmix64(salt))


def _global_index(coordinates: Sequence[Tensor], global_shape: Sequence[int]) -> Tensor:
    """Row-major index in ``global_shape`` of each element of a part, one dim a coordinate."""
    index = coordinates[0]
    for along, full in zip(coordinates[1:], global_shape[1:], strict=True):
        index = index.unsqueeze(-1) * full + along
    return index


def keep_mask(
    keys: Tensor,
    site: int,
    local_shape: Sequence[int],
    p: float,
    coordinates: Sequence[Tensor] | None = None,
    global_shape: Sequence[int] | None = None,
) -> Tensor:
    """Which elements of a part of each sample's tensor survive, ``(B, *local_shape)`` bool.

    Args:
        keys: ``(B,)`` int64 of :func:`sample_keys`.
        site: the place in the model, unique among all places that drop.
        local_shape: shape of the part of one sample (no batch dim).
        p: probability that an element is dropped, in [0, 1).
        coordinates: for each dim of the part its places in the sample's whole tensor, ``(n_i,)``
            int64; 0, 1, ... by default.
        global_shape: shape of the sample's whole tensor; ``local_shape`` by default.
    """
    if coordinates is None or global_shape is None:
        coordinates = [torch.arange(length, device=keys.device) for length in local_shape]
        global_shape = local_shape
    bound = int(p * (1 << _DECISION_BITS))
    if LIBRARY.enabled and keys.device.type == "cpu":
        return _in_one_pass(keys, site, coordinates, global_shape, bound)
    index = _global_index(coordinates, global_shape)
    salt = torch.full((), _signed64(site), dtype=torch.int64, device=keys.device)
    streams = splitmix64(keys ^ splitmix64(salt))
    streams = streams.view(-1, *(1,) * len(coordinates))  # (B, 1, ...)
    bits = splitmix64(streams + index * _INCREMENT)  # (B, *local_shape)
    return _shift_right(bits, 64 - _DECISION_BITS) >= bound


def _in_one_pass(
    keys: Tensor, site: int, coordinates: Sequence[Tensor], global_shape: Sequence[int], bound: int
) -> Tensor:
    *outer, places = (along.contiguous() for along in coordinates)
    rows = _global_index(outer, global_shape[:-1]).flatten() if outer else places.new_zeros(1)
    length, signed = global_shape[-1], _signed64(site)
    keep = passes.keep_mask(keys.contiguous(), signed, rows, places, length, bound)
    return keep.view(len(keys), *(len(along) for along in coordinates))


class CounterDropout(nn.Module):
    """Drops elements by :func:`keep_mask` while training and scales the rest by 1/(1-p).

    When the tensor it sees is a slice of the sample's tensor (heads under tensor parallelism, the
    sequence under sequence or context parallelism), whoever cuts the model says so with
    :meth:`set_shard` and :meth:`set_chunks`.

    Args:
        p: probability that an element is dropped, in [0, 1).
        site: the place in the model, unique among all places that drop.
    """

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        assert 0 <= p < 1, p
        self.p, self.site = p, site
        self._shards: dict[int, tuple[int, int]] = {}
        self._chunks: dict[int, tuple[tuple[int, ...], int]] = {}

    def set_shard(self, dim: int, index: int, count: int) -> None:
        """Declare that the input is slice ``index`` of ``count`` equal slices along ``dim``.

        ``dim`` counts in one sample's tensor (0 is the first dim after the batch).
        """
        assert dim >= 0, dim
        assert 0 <= index < count, (index, count)
        self._shards[dim] = (index, count)

    def set_chunks(self, dim: int, chunks: Sequence[int], count: int) -> None:
        """Declare that ``dim`` holds these of its ``count`` equal chunks, one after the other.

        A slice of :meth:`set_shard` is one of what the chunks make up together.
        """
        assert all(0 <= chunk < count for chunk in chunks), (chunks, count)
        self._chunks[dim] = (tuple(chunks), count)

    def coordinates(self, dim: int, length: int, device: torch.device) -> tuple[Tensor, int]:
        """Places along ``dim`` of an input of this length, ``(length,) int64``, and the length
        of the sample's whole tensor.
        """
        index, slices = self._shards.get(dim, (0, 1))
        chunks, count = self._chunks.get(dim, ((0,), 1))
        size = length * slices // len(chunks)  # of a chunk
        every = [torch.arange(c * size, (c + 1) * size, device=device) for c in chunks]
        return torch.cat(every)[index * length : (index + 1) * length], count * size

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """``x`` (B, ...) and ``keys`` (B,) -> (B, ...); the identity in eval mode or when p = 0.

        Raises:
            ValueError: training with p > 0 and no keys.
        """
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise self.missing_keys()
        places = [self.coordinates(d, n, x.device) for d, n in enumerate(x.shape[1:])]
        keep = self.keep(keys, [at for at, _ in places], [full for _, full in places])
        return x.masked_fill(~keep, 0.0) * (1.0 / (1.0 - self.p))

    def missing_keys(self) -> ValueError:
        """What to raise where dropout is active and the samples are not known."""
        return ValueError(
            f"dropout p={self.p} is active in training but no dropout_keys were given; pass "
            "dropout_keys=sample_keys(seed, sample_ids), or call .eval(), or set dropout to 0"
        )

    def keep(
        self, keys: Tensor, coordinates: Sequence[Tensor], global_shape: Sequence[int]
    ) -> Tensor:
        """Which elements at these places survive; see :func:`keep_mask`."""
        local = [len(places) for places in coordinates]
        return keep_mask(keys, self.site, local, self.p, coordinates, global_shape)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p}, site={self.site}"
