"""Insertion of slices with many values a sample at once on the CPU: where a sample falls is found once for all."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.kernels.cpu_location import BLOCK, array, list_mine, locate, planes, scaled_pixels
from scalecryo.physics.kernels.jit import in_threads, kernel


@kernel
def _insert(
    share: int,
    shares: int,
    values: np.ndarray,
    signed: int,
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    grid: np.ndarray,
) -> None:
    """Each thread adds to the planes that it owns. Odd channels below `signed` change their sign with the sample's."""
    box, channels = grid.shape[0], grid.shape[3]
    mine = planes(share, shares, box)
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    todo = np.empty(BLOCK, np.int32)
    turned = np.empty(channels, np.float32)
    for b in range(rotation.shape[0]):
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            locate(rotation[b], kx[start : start + block], ky[start : start + block], box, fraction, corner)
            found = list_mine(mine, corner, block, todo)
            for place in range(found):
                i = todo[place]
                value = values[b, start + i]
                for c in range(channels):
                    turned[c] = value[c]
                if fraction[3, i] < 0:
                    for c in range(1, signed, 2):
                        turned[c] = -turned[c]
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
                            near[c] += left_share * turned[c]
                            next_[c] += right_share * turned[c]


def insert_channels_cpu(
    values: Float[Tensor, "b p c"],
    signed: int,
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
    grid: Float[Tensor, "d d h c"],
) -> None:
    """Add centred slices to a grid of c real values a voxel, in place, as `fourier_slice.insert_slices` does one.

    Args:
        values: float32; of the first `signed`, even ones are real and odd ones imaginary parts.
        signed: number of channels that hold complex values.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: the grid's box over the image box.
        grid: contiguous float32, added to; the result does not depend on the number of threads.

    Raises:
        InputError: another dtype, arrays of the wrong shape, a grid that is not contiguous, rotations that are none.
    """
    count, pixels, channels = len(rotation), len(kx), grid.shape[-1]
    fits = values.shape == (count, pixels, channels) and values.dtype == grid.dtype == torch.float32
    if not fits or not grid.is_contiguous() or grid.shape[0] != grid.shape[1]:
        raise InputError(
            f"values {tuple(values.shape)} {values.dtype} do not fit {count} rotations, {pixels} pixels and a grid "
            f"{tuple(grid.shape)} {grid.dtype}: give contiguous float32"
        )
    if not bool((rotation.abs() <= 2).all()):
        raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")
    x, y, inside = scaled_pixels(kx, ky, scale, grid.shape[0])
    held = array(values * torch.from_numpy(inside)[None, :, None])
    in_threads(_insert, count * pixels, held, signed, array(rotation.float()), x, y, grid.numpy())
