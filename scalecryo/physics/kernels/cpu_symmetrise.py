"""Sums on half-complex grids and their rotated copies, added on the CPU by numba: trilinear, as the slices are.

Every thread has output planes of its own, and every voxel receives its copies in the same order: results are the same,
bit for bit, for any number of threads.
"""

import math

import numpy as np
import torch
from torch import Tensor

from scalecryo.physics.kernels.cpu_location import array
from scalecryo.physics.kernels.jit import in_threads, kernel


@kernel
def _add_copies(
    share: int,
    shares: int,
    source: np.ndarray,
    power: np.ndarray,
    box: int,
    rotations: np.ndarray,
    limit: float,
    result: np.ndarray,
    weight: np.ndarray,
) -> None:
    """One thread's planes. source, result: (grids, d * d * h, 2); power, weight: (grids, d * d * h)."""
    half, width = box // 2, box // 2 + 1
    squared = np.float32(limit * limit)
    part, at = np.empty(8, np.float32), np.empty(8, np.intp)
    one = np.float32(1)
    for plane in range(share, box, shares):
        kz = np.float32(plane if plane < half else plane - box)
        for row in range(box):
            ky = np.float32(row if row < half else row - box)
            for column in range(width):
                kx = np.float32(column)
                if kx * kx + ky * ky + kz * kz > squared:
                    break
                here = (plane * box + row) * width + column
                for g in range(rotations.shape[0]):
                    turn = rotations[g]
                    x = turn[0, 0] * kx + turn[0, 1] * ky + turn[0, 2] * kz
                    y = turn[1, 0] * kx + turn[1, 1] * ky + turn[1, 2] * kz
                    z = turn[2, 0] * kx + turn[2, 1] * ky + turn[2, 2] * kz
                    sign = np.copysign(one, x)  # -1: the Friedel partner is read
                    x, y, z = x * sign, y * sign, z * sign
                    # Within the limit nothing is cut: this keeps everything else within the arrays.
                    low_x = min(int(x), half - 1)
                    low_y = max(min(math.floor(y), half - 2), -half)
                    low_z = max(min(math.floor(z), half - 2), -half)
                    fx, fy, fz = np.float32(x - low_x), np.float32(y - low_y), np.float32(z - low_z)
                    for corner in range(4):
                        far_y, far_z = corner & 1, corner >> 1
                        line = (fy if far_y else one - fy) * (fz if far_z else one - fz)
                        at_y, at_z = low_y + far_y, low_z + far_z
                        at_y += box if at_y < 0 else 0
                        at_z += box if at_z < 0 else 0
                        at[2 * corner] = (at_z * box + at_y) * width + low_x
                        at[2 * corner + 1] = at[2 * corner] + 1
                        part[2 * corner] = line * (one - fx)
                        part[2 * corner + 1] = line * fx
                    for grid in range(power.shape[0]):
                        values, powers = source[grid], power[grid]
                        real = imag = total = np.float32(0)
                        for corner in range(8):
                            real += part[corner] * values[at[corner], 0]
                            imag += part[corner] * values[at[corner], 1]
                            total += part[corner] * powers[at[corner]]
                        result[grid, here, 0] += real
                        result[grid, here, 1] += sign * imag
                        weight[grid, here] += total


def add_copies_cpu(numerator: Tensor, denominator: Tensor, rotations: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """See `symmetrise.with_copies`; grids (m, d, d, h) of Hermitian values, complex and real."""
    grids, box = len(numerator), numerator.shape[1]
    result, weight = numerator.clone(), denominator.clone()
    source = array(torch.view_as_real(numerator.contiguous())).reshape(grids, -1, 2)
    samples = int(len(rotations) * grids * (2 * radius) ** 3)
    in_threads(
        _add_copies, samples, source, array(denominator).reshape(grids, -1), box, array(rotations.float()), radius,
        torch.view_as_real(result).numpy().reshape(grids, -1, 2), weight.numpy().reshape(grids, -1),
    )  # fmt: skip
    return result, weight
