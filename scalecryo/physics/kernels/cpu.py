"""Slice extraction and insertion on the CPU, compiled: the semantics of `physics.fourier_slice`, without gradients.

Single precision. Pixels are worked on in blocks: a vectorised pass finds where they fall, a second one reads or adds
to the eight neighbours. Insertion gives every thread planes of its own, so it needs no atomics and every voxel
receives its samples in the same order: results are the same, bit for bit, for any number of threads.
"""

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import check_even_box
from scalecryo.physics.kernels.jit import Integer, Real, in_threads, kernel, part

_BLOCK = 256
# Planes that go to the same thread: long runs split fewer samples over two threads, short ones balance better.
_SLAB = 8


@part
def _locate(
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    start: int,
    count: int,
    box: int,
    fraction: np.ndarray,
    corner: np.ndarray,
) -> None:
    """Where a block of samples falls.

    fraction: x, y, z between neighbours and the sign (-1: the mate -q was taken). corner: x, then y, y+1, z, z+1 as
    stored rows and planes.
    """
    half, size = np.float32(box // 2), np.int32(box)
    zero, one = np.float32(0), np.float32(1)
    xx, xy, yx, yy = rotation[0, 0], rotation[0, 1], rotation[1, 0], rotation[1, 1]
    zx, zy = rotation[2, 0], rotation[2, 1]
    for i in range(count):
        u, v = kx[start + i], ky[start + i]
        x, y, z = xx * u + xy * v, yx * u + yy * v, zx * u + zy * v
        sign = np.copysign(one, x)
        x, y, z = x * sign, y * sign, z * sign
        # No effect on rotations: they keep everything else within the arrays.
        low_x = min(max(np.floor(x), zero), half - one)
        low_y = min(max(np.floor(y), -half), half - one)
        low_z = min(max(np.floor(z), -half), half - one)
        fraction[0, i], fraction[1, i], fraction[2, i], fraction[3, i] = x - low_x, y - low_y, z - low_z, sign
        row, plane = np.int32(low_y), np.int32(low_z)
        corner[0, i] = np.int32(low_x)
        corner[1, i] = row + size if row < 0 else row
        corner[2, i] = row + 1 + size if row < -1 else row + 1
        corner[3, i] = plane + size if plane < 0 else plane
        corner[4, i] = plane + 1 + size if plane < -1 else plane + 1


@part
def _between(volume: np.ndarray, row: Integer, x: Real) -> complex:
    """Interpolate along x from a flat index."""
    at = np.uintp(row)
    return volume[at] + (volume[at + np.uintp(1)] - volume[at]) * x


@kernel
def _extract(
    share: int,
    shares: int,
    volume: np.ndarray,
    box: int,
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    inside: np.ndarray,
    slices: np.ndarray,
) -> None:
    """One thread's images: every `shares`-th."""
    fraction, corner = np.empty((4, _BLOCK), np.float32), np.empty((5, _BLOCK), np.int32)
    width, count = box // 2 + 1, kx.shape[0]
    for b in range(share, rotation.shape[0], shares):
        for start in range(0, count, _BLOCK):
            block = min(_BLOCK, count - start)
            _locate(rotation[b], kx, ky, start, block, box, fraction, corner)
            for i in range(block):
                x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
                column = np.intp(corner[0, i])
                near, far = np.intp(corner[3, i]) * box, np.intp(corner[4, i]) * box
                low, high = np.intp(corner[1, i]), np.intp(corner[2, i])
                line_0 = _between(volume, (near + low) * width + column, x)
                line_1 = _between(volume, (near + high) * width + column, x)
                line_2 = _between(volume, (far + low) * width + column, x)
                line_3 = _between(volume, (far + high) * width + column, x)
                line_0 += (line_1 - line_0) * y
                line_2 += (line_3 - line_2) * y
                value = (line_0 + (line_2 - line_0) * z) * inside[start + i]
                slices[b, start + i] = complex(value.real, value.imag * fraction[3, i])


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
    box: int,
    numerator: np.ndarray,
    denominator: np.ndarray,
) -> None:
    """Every image, but only one thread's planes: runs of _SLAB, dealt round."""
    fraction, corner = np.empty((4, _BLOCK), np.float32), np.empty((5, _BLOCK), np.int32)
    mine, todo = np.empty(box, np.int32), np.empty(_BLOCK + 1, np.int32)
    for z_plane in range(box):
        mine[z_plane] = (z_plane // _SLAB) % shares == share
    width, count = box // 2 + 1, kx.shape[0]
    for b in range(rotation.shape[0]):
        if _is_zero(values[b], power[b]):
            continue
        for start in range(0, count, _BLOCK):
            block = min(_BLOCK, count - start)
            _locate(rotation[b], kx, ky, start, block, box, fraction, corner)
            # Listed first, without branches: they could not be predicted.
            mine_here = 0
            for i in range(block):
                todo[mine_here] = i
                mine_here += mine[corner[3, i]] | mine[corner[4, i]]
            for j in range(mine_here):
                i = todo[j]
                x, y, z, keep = fraction[0, i], fraction[1, i], fraction[2, i], inside[start + i]
                low, high, column = np.intp(corner[1, i]), np.intp(corner[2, i]), np.intp(corner[0, i])
                real, imag = values[b, start + i].real * keep, values[b, start + i].imag * keep * fraction[3, i]
                amount = power[b, start + i] * keep
                for plane, near in ((corner[3, i], np.float32(1) - z), (corner[4, i], z)):
                    if mine[plane]:
                        r, m, a = real * near, imag * near, amount * near
                        top, bottom = (plane * box + low) * width + column, (plane * box + high) * width + column
                        _add(numerator, denominator, top, x, r - r * y, m - m * y, a - a * y)
                        _add(numerator, denominator, bottom, x, r * y, m * y, a * y)


def _geometry(
    rotation: Tensor, kx: Tensor, ky: Tensor, scale: float, box: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rotations, scaled frequencies and the mask of those within |k| scale <= box/2 - 1, as arrays."""
    check_even_box(box)
    if not bool((rotation.abs() <= 2).all()):
        raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")
    x, y = scale * kx.float(), scale * ky.float()
    inside = (torch.hypot(x, y) <= box // 2 - 1 + 1e-4).float()
    return _array(rotation.float()), _array(x), _array(y), _array(inside)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_conj().contiguous().numpy()


def _require(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} is {found}: the compiled kernels take {dtype} on the CPU; convert it")


def extract_slices_cpu(
    volume_rfft: Complex[Tensor, "d d h"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
) -> Complex[Tensor, "b p"]:
    """`fourier_slice.extract_slices` without gradients: central slices at scale R (kx, ky, 0).

    Args:
        volume_rfft: complex64, on the CPU.
        rotation: image frame to volume frame; double precision is rounded to single.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.

    Raises:
        InputError: another dtype or device, an odd box, rotations that are none.
    """
    _require(volume_rfft, torch.complex64, "volume_rfft")
    box = volume_rfft.shape[0]
    turned, x, y, inside = _geometry(rotation, kx, ky, scale, box)
    slices = torch.empty(len(rotation), len(kx), dtype=torch.complex64)
    in_threads(_extract, slices.numel(), _array(volume_rfft).ravel(), box, turned, x, y, inside, slices.numpy())
    return slices


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
    turned, x, y, inside = _geometry(rotation, kx, ky, scale, box)
    in_threads(
        _insert,
        values.numel(),
        _array(values),
        _array(power),
        turned,
        x,
        y,
        inside,
        box,
        torch.view_as_real(numerator).numpy().ravel(),
        denominator.numpy().ravel(),
    )
