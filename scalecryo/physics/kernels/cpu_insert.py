"""Insertion of slices on the CPU, compiled by numba: the semantics of `fourier_slice.insert_slices`.

Single precision. Every thread has planes of its own, so this needs no atomics and every voxel receives its samples in
the same order: results are the same, bit for bit, for any number of threads.
"""

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.kernels.cpu_location import BLOCK, array, geometry, list_mine, locate, planes
from scalecryo.physics.kernels.jit import Integer, Real, in_threads, kernel, part


@part
def _add(
    numerator: np.ndarray, denominator: np.ndarray, row: Integer, x: Real, real: Real, imag: Real, power: Real
) -> None:
    """Add to two neighbours along x, in the flat grids (the numerator as pairs of real numbers)."""
    at = np.uintp(row)
    next_one, pair = at + np.uintp(1), at + at
    real_x, imag_x, power_x = real * x, imag * x, power * x
    numerator[pair] += real - real_x
    numerator[pair + np.uintp(1)] += imag - imag_x
    numerator[pair + np.uintp(2)] += real_x
    numerator[pair + np.uintp(3)] += imag_x
    denominator[at] += power - power_x
    denominator[next_one] += power_x


@part
def _is_zero(values: np.ndarray, power: np.ndarray) -> bool:
    return not (np.any(power) or np.any(values))


@kernel
def _insert(
    share: int,
    shares: int,
    values: np.ndarray,
    power: np.ndarray,
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    inside: np.ndarray,
    order: np.ndarray,
    box: int,
    numerator: np.ndarray,
    denominator: np.ndarray,
) -> None:
    """Every image, but only one thread's planes: runs of _SLAB, dealt round."""
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    mine, todo = planes(share, shares, box), np.empty(BLOCK + 1, np.int32)
    width, count = box // 2 + 1, kx.shape[0]
    for b in range(rotation.shape[0]):
        if _is_zero(values[b], power[b]):
            continue
        for start in range(0, count, BLOCK):
            block = min(BLOCK, count - start)
            locate(rotation[b], kx, ky, start, block, box, fraction, corner)
            mine_here = list_mine(mine, corner, block, todo)
            for j in range(mine_here):
                i = todo[j]
                x, y, z, keep = fraction[0, i], fraction[1, i], fraction[2, i], inside[start + i]
                low, high, column = np.intp(corner[1, i]), np.intp(corner[2, i]), np.intp(corner[0, i])
                at = order[start + i]
                real, imag = values[b, at].real * keep, values[b, at].imag * keep * fraction[3, i]
                amount = power[b, at] * keep
                for plane, near in ((corner[3, i], np.float32(1) - z), (corner[4, i], z)):
                    if mine[plane]:
                        r, m, a = real * near, imag * near, amount * near
                        top, bottom = (plane * box + low) * width + column, (plane * box + high) * width + column
                        _add(numerator, denominator, top, x, r - r * y, m - m * y, a - a * y)
                        _add(numerator, denominator, bottom, x, r * y, m * y, a * y)


def _require(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} is {found}: the compiled kernels take {dtype} on the CPU; convert it")


def insert_slices_cpu(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "b p"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
    numerator: Complex[Tensor, "d d h"],
    denominator: Float[Tensor, "d d h"],
) -> None:
    """`fourier_slice.insert_slices` of complex values and of real weights, in one go, added to two grids in place.

    Images whose values and weights are all zero cost nothing. The result does not depend on the number of threads.

    Args:
        values: complex64.
        power: float32, the weights that belong to them.
        rotation: image frame to volume frame; double precision is rounded to single.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.
        numerator: contiguous complex64, added to.
        denominator: contiguous float32, added to.

    Raises:
        InputError: another dtype or device, arrays of the wrong shape, grids that are not contiguous, an odd box,
            rotations that are none.
    """
    for name, tensor, dtype in (
        ("values", values, torch.complex64),
        ("power", power, torch.float32),
        ("numerator", numerator, torch.complex64),
        ("denominator", denominator, torch.float32),
    ):
        _require(tensor, dtype, name)
    box = numerator.shape[0]
    shape = (box, box, box // 2 + 1)
    for name, grid in (("numerator", numerator), ("denominator", denominator)):
        if tuple(grid.shape) != shape or not grid.is_contiguous() or grid.is_conj():
            raise InputError(f"{name} has shape {tuple(grid.shape)}: give a contiguous grid of shape {shape}")
    needed = (len(rotation), len(kx))
    for name, given in (("values", values), ("power", power)):
        if tuple(given.shape) != needed:
            raise InputError(f"{name} has shape {tuple(given.shape)}: rotations and pixels need {needed}")
    if not bool((rotation.abs() <= 2).all()):
        raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")
    in_threads(
        _insert,
        values.numel(),
        array(values),
        array(power),
        *geometry(rotation, kx, ky, scale, box),
        box,
        torch.view_as_real(numerator).numpy().ravel(),
        denominator.numpy().ravel(),
    )
