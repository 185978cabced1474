"""Insertion of images with many weights each at once on the CPU: where a sample falls is found once for all."""

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.kernels.cpu_location import BLOCK, array, geometry, list_mine, locate, planes
from scalecryo.physics.kernels.jit import in_threads, kernel
from scalecryo.physics.kernels.vectors import prefetch

_AHEAD, _LINE = 8, 16  # samples whose voxels are asked for before they are needed; floats in a cache line

_Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""values, power, first, second: `insert_channels_cpu`."""
_Places = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Rotations and pixels, as in `cpu_location.Geometry`."""


@kernel
def _insert(
    share: int,
    shares: int,
    images: _Images,
    where: _Places,
    grid: np.ndarray,
) -> None:
    """Each thread adds to the planes that it owns."""
    (values, power, first, second), (rotation, kx, ky, inside, order) = images, where
    box, width, channels, count = grid.shape[0], grid.shape[2], grid.shape[3], first.shape[1]
    flat, mine, one = grid.reshape(-1), planes(share, shares, box), np.float32(1)
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    todo, pair = np.empty(BLOCK, np.int32), np.empty(2 * channels, np.float32)
    for b in range(rotation.shape[0]):
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            locate(rotation[b], kx[start : start + block], ky[start : start + block], box, fraction, corner)
            found = list_mine(mine, corner, block, todo)
            for place in range(found):
                if place + _AHEAD < found:
                    later = todo[place + _AHEAD]
                    for far_z in range(2):
                        for far_y in range(2):
                            row = (np.int64(corner[3 + far_z, later]) * box + corner[1 + far_y, later]) * width
                            at = (row + corner[0, later]) * channels
                            for line in range(0, 2 * channels, _LINE):
                                prefetch(flat, at + line)
                i = todo[place]
                pixel, kept, right = order[start + i], inside[start + i], fraction[0, i]
                real, weight = values[b, pixel].real * kept, power[b, pixel] * kept
                imag = values[b, pixel].imag * kept * fraction[3, i]
                for k in range(count):
                    pair[2 * k], pair[2 * k + 1] = first[b, k] * real, first[b, k] * imag
                for k in range(second.shape[1]):
                    pair[2 * count + k] = second[b, k] * weight
                for c in range(channels):
                    pair[channels + c], pair[c] = pair[c] * right, pair[c] * (one - right)
                for far_z in range(2):
                    z = corner[3 + far_z, i]
                    if not mine[z]:
                        continue
                    depth = fraction[2, i] if far_z else one - fraction[2, i]
                    for far_y in range(2):
                        height = depth * (fraction[1, i] if far_y else one - fraction[1, i])
                        row = (np.int64(z) * box + corner[1 + far_y, i]) * width + corner[0, i]
                        at = np.uintp(row * channels)
                        for c in range(2 * channels):  # both neighbours along x
                            flat[at + np.uintp(c)] += height * pair[c]


def insert_channels_cpu(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "b p"],
    first: Float[Tensor, "b q"],
    second: Float[Tensor, "b t"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    grid: Float[Tensor, "d d h c"],
) -> None:
    """Add centred slices to a grid of c = 2 q + t real values a voxel, in place, as `fourier_slice.insert_slices` does.

    The first 2 q channels get the real and imaginary parts of values times each of `first`, the others power times each
    of `second`.

    Args:
        values: complex64.
        power: float32.
        first: weights of each image's values.
        second: weights of each image's power.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: the grid's box over the image box.
        grid: contiguous float32, added to; the result does not depend on the number of threads.

    Raises:
        InputError: another dtype, arrays of the wrong shape, a grid that is not contiguous, rotations that are none.
    """
    count, pixels, channels = len(rotation), len(kx), 2 * first.shape[1] + second.shape[1]
    fits = values.shape == power.shape == (count, pixels) and len(first) == len(second) == count
    fits = fits and grid.shape[3] == channels and grid.shape[0] == grid.shape[1] and grid.is_contiguous()
    if not fits or values.dtype != torch.complex64 or power.dtype != torch.float32 or grid.dtype != torch.float32:
        raise InputError(
            f"values {tuple(values.shape)} {values.dtype} and power {tuple(power.shape)} {power.dtype} do not fit "
            f"{count} rotations, {pixels} pixels and a grid {tuple(grid.shape)} {grid.dtype}: give contiguous float32"
        )
    if not bool((rotation.abs() <= 2).all()):
        raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")
    images = array(values), array(power), array(first.float()), array(second.float())
    where = tuple(geometry(rotation, kx, ky, scale, grid.shape[0]))
    in_threads(_insert, count * pixels, images, where, grid.numpy())
