"""Insertion of images with many weights each at once on the CPU: where a sample falls is found once for all."""

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.kernels.cpu_location import BLOCK, array, list_mine, locate, planes, scaled_pixels
from scalecryo.physics.kernels.jit import in_threads, kernel

_Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""values, power, first, second: `insert_channels_cpu`."""


@kernel
def _insert(
    share: int,
    shares: int,
    images: _Images,
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    grid: np.ndarray,
) -> None:
    """Each thread adds to the planes that it owns."""
    values, power, first, second = images
    box, channels, count = grid.shape[0], grid.shape[3], first.shape[1]
    mine = planes(share, shares, box)
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    todo, added = np.empty(BLOCK, np.int32), np.empty(channels, np.float32)
    for b in range(rotation.shape[0]):
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            locate(rotation[b], kx[start : start + block], ky[start : start + block], box, fraction, corner)
            found = list_mine(mine, corner, block, todo)
            for place in range(found):
                i = todo[place]
                real, imag = values[b, start + i].real, values[b, start + i].imag * fraction[3, i]
                weight = power[b, start + i]
                for k in range(count):
                    added[2 * k] = first[b, k] * real
                    added[2 * k + 1] = first[b, k] * imag
                for k in range(second.shape[1]):
                    added[2 * count + k] = second[b, k] * weight
                x, right = corner[0, i], fraction[0, i]
                for far_z in range(2):
                    z = corner[3 + far_z, i]
                    if not mine[z]:
                        continue
                    depth = fraction[2, i] if far_z else np.float32(1) - fraction[2, i]
                    for far_y in range(2):
                        y = corner[1 + far_y, i]
                        height = depth * (fraction[1, i] if far_y else np.float32(1) - fraction[1, i])
                        near, next_ = grid[z, y, x], grid[z, y, x + 1]
                        left_share, right_share = height * (np.float32(1) - right), height * right
                        for c in range(channels):
                            near[c] += left_share * added[c]
                            next_[c] += right_share * added[c]


def insert_channels_cpu(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "b p"],
    first: Float[Tensor, "b q"],
    second: Float[Tensor, "b t"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
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
    x, y, inside = scaled_pixels(kx, ky, scale, grid.shape[0])
    held = array(values * torch.from_numpy(inside)), array(power * torch.from_numpy(inside))
    images = *held, array(first.float()), array(second.float())
    in_threads(_insert, count * pixels, images, array(rotation.float()), x, y, grid.numpy())
