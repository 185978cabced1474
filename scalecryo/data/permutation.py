"""Pseudo-random permutations of any range, element by element."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

MASK = (1 << 64) - 1
_ROUNDS = 6
_FEW = 16


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood 2014): spreads every input bit over 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Rows, size: int, seed: int, epoch: int) -> Rows:
    """Images of `index` under a pseudo-random permutation of range(size), keyed by seed and epoch.

    A balanced Feistel network on the next power of four, walked until it lands inside the range
    (Black & Rogaway 2002): random access, no memory in `size`.
    """
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed & MASK, epoch & MASK)
    if len(index) <= _FEW:
        return np.array([_walk(int(value), size, half_bits, keys) for value in index], dtype=np.int64)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)

    def step(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> shift, value & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ np.uint64(key)) & mask)
        return (left << shift) | right

    value = step(np.asarray(index, dtype=np.uint64))
    outside = value >= np.uint64(size)
    while outside.any():
        value[outside] = step(value[outside])
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    base = np.array([seed, epoch, 0x9E3779B97F4A7C15], dtype=np.uint64)
    key = mix(mix(mix(base[:1]) ^ base[1:2]) ^ base[2:])
    return tuple(int(key) for key in mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * base[2]))


def _walk(value: int, size: int, half_bits: int, keys: tuple[int, ...]) -> int:
    """One element, in plain integers: for few elements a fifth of what NumPy's calls cost."""
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            x = right ^ key
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, left ^ ((x ^ (x >> 31)) & mask)
        value = (left << half_bits) | right
        if value < size:
            return value
