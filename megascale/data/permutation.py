"""A keyed permutation of [0, size) that is computed and never stored.

A balanced Feistel network (Luby & Rackoff 1988, https://doi.org/10.1137/0217022) is a bijection on
the numbers of an even count of bits, whatever its round function is. Cycle walking (Black &
Rogaway 2002, "Ciphers with Arbitrary Finite Domains") brings it to any size: a value that falls
outside goes through the network again until it falls inside. The network's domain is less than
four times the size, so a value walks fewer than four steps on average.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
MAX_SIZE = 1 << 62


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), elementwise: uint64 to uint64.

    A bijection on 64 bits in which every input bit changes every output bit with probability 1/2.
    """
    mixed = np.asarray(values).astype(np.uint64)  # a copy: the input stays
    mixed += np.uint64(_GOLDEN)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers of any size; each part and their order matter."""
    key = len(parts)
    for part in parts:
        key = _mix_int(key ^ _mix_int(part & _MASK64))
        part >>= 64
        while part not in (0, -1):
            key = _mix_int(key ^ _mix_int(part & _MASK64))
            part >>= 64
    return key


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of [0, size), chosen by `key`, sends each of `indices`.

    Args:
        indices: integers in [0, size), any shape.
        size: at least 1, at most 2**62.
        key: 64 bits.

    Returns:
        int64, the shape of `indices`. Memory and time do not depend on `size`.
    """
    indices = np.asarray(indices)
    assert 1 <= size <= MAX_SIZE, f"size {size}"
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < size), "index out of range"
    half_bits = (max(size - 1, 1).bit_length() + 1) // 2
    values = _feistel(indices.astype(np.uint64).ravel(), half_bits, key)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values[outside], half_bits, key)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        round_key = np.uint64(derive_key(key, number))
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return (left << shift) | right


def _mix_int(value: int) -> int:
    """`mix64` for one Python int; numpy scalars would warn on overflow."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
