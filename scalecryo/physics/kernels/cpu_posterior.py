"""Posterior mass of images over rotations and their flips, from the two matrix products, by numba on the CPU.

What torch does in a dozen passes over the scores is one pass for the largest and one for the sums. Every image is
summed in the same order: results are the same, bit for bit, for any number of threads.
"""

import math

import numpy as np
import torch
from torch import Tensor

from scalecryo.physics.kernels.cpu_location import array
from scalecryo.physics.kernels.jit import Integer, Real, in_threads, kernel, part
from scalecryo.physics.kernels.vectors import as_float

_LANES = 16
_LOG2_E = 1 / math.log(2)
_LEAST = -100.0  # power of two below which results would slowly underflow, and add nothing
_LN_2 = math.log(2)
_C2, _C3, _C4, _C5, _C6 = (_LN_2**k / math.factorial(k) for k in range(2, 7))


@part
def _exp2(x: Real) -> Real:
    """2**x of x <= 0, to 2e-7: Taylor series about the next whole number, which vectorises (np.exp2 does not)."""
    x = x if not x < np.float32(_LEAST) else np.float32(_LEAST)  # NaN stays
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    p = np.float32(_C6)
    p = p * f + np.float32(_C5)
    p = p * f + np.float32(_C4)
    p = p * f + np.float32(_C3)
    p = p * f + np.float32(_C2)
    p = p * f + np.float32(_LN_2)
    p = p * f + np.float32(1)
    return p * as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@part
def _largest(even: np.ndarray, odd: np.ndarray, bias: np.ndarray, lanes: np.ndarray) -> Real:
    """Best score of an image at any shift, rotation or flip: even - bias + |odd|."""
    lanes[:] = -np.inf
    count = bias.shape[0]
    full = count // _LANES * _LANES
    for shift in range(even.shape[0]):
        e, o = even[shift], odd[shift]
        for first in range(0, full, _LANES):
            for lane in range(_LANES):
                score = e[first + lane] - bias[first + lane] + abs(o[first + lane])
                lanes[lane] = score if score > lanes[lane] else lanes[lane]
        for rest in range(full, count):
            score = e[rest] - bias[rest] + abs(o[rest])
            lanes[0] = score if score > lanes[0] else lanes[0]
    return lanes.max()


@kernel
def _evidence(
    share: Integer, shares: Integer, even: np.ndarray, odd: np.ndarray, bias: np.ndarray, found: np.ndarray
) -> None:
    """One thread's images. even, odd: (b, t, h); bias: (b or 1, h); found: (b,)."""
    lanes, scale = np.empty(_LANES, np.float32), np.float32(_LOG2_E)
    for image in range(share, found.shape[0], shares):
        less = bias[image % bias.shape[0]]
        top = _largest(even[image], odd[image], less, lanes)
        total = np.float32(0)
        for shift in range(even.shape[1]):
            e, o = even[image, shift], odd[image, shift]
            own = np.float32(0)
            for h in range(less.shape[0]):
                middle, off = (e[h] - less[h] - top) * scale, o[h] * scale
                own += _exp2(middle + off) + _exp2(middle - off)
            total += own
        found[image] = top + np.float32(math.log(total))


@kernel
def _shares(
    share: Integer,
    shares: Integer,
    even: np.ndarray,
    odd: np.ndarray,
    bias: np.ndarray,
    mass: np.ndarray,
    total: np.ndarray,
    found: np.ndarray,
) -> None:
    """One thread's images, as in `_evidence`; mass: (b, h), zeros; total: (b,)."""
    lanes, scale = np.empty(_LANES, np.float32), np.float32(_LOG2_E)
    for image in range(share, found.shape[0], shares):
        less, by_rotation = bias[image % bias.shape[0]], mass[image]
        top = _largest(even[image], odd[image], less, lanes)
        for shift in range(even.shape[1]):
            e, o = even[image, shift], odd[image, shift]
            own = np.float32(0)
            for h in range(less.shape[0]):
                middle, off = (e[h] - less[h] - top) * scale, o[h] * scale
                here, flip = _exp2(middle + off), _exp2(middle - off)
                own += here + flip
                by_rotation[h] += here + flip
                e[h], o[h] = here + flip, here - flip
            total[image] += own
        found[image] = top + np.float32(math.log(total[image]))


@kernel
def _add(
    share: Integer,
    shares: Integer,
    both: np.ndarray,
    difference: np.ndarray,
    mass: np.ndarray,
    least: np.ndarray,
    real: np.ndarray,
    imaginary: np.ndarray,
    real_sums: np.ndarray,
    imaginary_sums: np.ndarray,
) -> None:
    """One thread's rotations. both, difference: (b, t, h); mass: (b, h); least: (b,); images: (b, t, p)."""
    rotations = mass.shape[1]
    for image in range(mass.shape[0]):
        for h in range(rotations * share // shares, rotations * (share + 1) // shares):
            if mass[image, h] <= least[image]:
                continue
            for shift in range(both.shape[1]):
                even, odd = both[image, shift, h], difference[image, shift, h]
                if even > least[image]:
                    for pixel in range(real.shape[2]):
                        real_sums[h, pixel] += even * real[image, shift, pixel]
                    for pixel in range(real.shape[2]):
                        imaginary_sums[h, pixel] += odd * imaginary[image, shift, pixel]


def pair_evidence_cpu(even: Tensor, odd: Tensor, bias: Tensor) -> Tensor:
    """See `pair_scores.pair_evidence`; (b, t, h) and (b or 1, h), single precision."""
    found = torch.empty(len(even))
    in_threads(_evidence, even.numel(), array(even), array(odd), array(bias), found.numpy())
    return found


def pair_shares_cpu(even: Tensor, odd: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `pair_scores.pair_shares`: mass, its total, the log-evidence. Even and odd are overwritten."""
    images, _, rotations = even.shape
    mass, total, found = torch.zeros(images, rotations), torch.zeros(images), torch.empty(images)
    in_threads(
        _shares, even.numel(), even.numpy(), odd.numpy(), array(bias), mass.numpy(), total.numpy(), found.numpy()
    )
    return mass, total, found


def add_shares_cpu(both: Tensor, difference: Tensor, mass: Tensor, least: Tensor, images: Tensor, sums: Tensor) -> None:
    """See `pair_scores.add_images`; sums of rotations (2, h, p), real and imaginary parts, are added to.

    Args:
        both, difference: (b, t, h), contiguous.
        mass: (b, h).
        least: (b,), of what is in `both`, to count.
        images: (b, t, p), complex.
    """
    parts = (images.real.contiguous().numpy(), images.imag.contiguous().numpy())
    in_threads(
        _add, both.numel(), both.numpy(), difference.numpy(), array(mass), array(least), *parts, *sums.numpy()
    )  # fmt: skip
