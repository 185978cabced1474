"""One Levenberg-Marquardt step of a pose on so(3) x R^2, compiled: five parameters wx, wy, wz (rad), tx, ty (px)."""

import math

import numpy as np

from scalecryo.physics.kernels.jit import Real, part

# What is added to the unit diagonal of the scaled normal matrix, and how it changes with success and failure.
FIRST_DAMPING = 1e-2
LEAST_DAMPING = 1e-4
DAMPING_FALL = 0.3
DAMPING_RISE = 10.0
# Steps below these (rad, px) are lost in single precision: the image is done.
LEAST_TURN = 1e-5
LEAST_SHIFT = 1e-4


@part
def damped_step(matrix: np.ndarray, gradient: np.ndarray, damping: Real, free: int, work: np.ndarray) -> None:
    """Row 5 of work: the damped step of the first `free` parameters, 0 for the rest and for what nothing depends on.

    Cholesky, rows 0 to 4, of the matrix scaled to a unit diagonal by row 6.
    """
    work[:] = 0
    step, scale = work[5], work[6]
    for u in range(free):
        scale[u] = 1 / math.sqrt(matrix[u, u]) if matrix[u, u] > 0 else 0.0
        for v in range(u + 1):
            total = 1 + damping if u == v else matrix[u, v] * scale[u] * scale[v]
            for k in range(v):
                total -= work[u, k] * work[v, k]
            # Positive but for rounding: the scaled matrix is positive semi-definite.
            work[u, v] = math.sqrt(max(total, LEAST_DAMPING)) if u == v else total / work[v, v]
        total = gradient[u] * scale[u]
        for k in range(u):
            total -= work[u, k] * step[k]
        step[u] = total / work[u, u]
    for u in range(free - 1, -1, -1):
        for k in range(u + 1, free):
            step[u] -= work[k, u] * step[k]
        step[u] /= work[u, u]
    for u in range(free):
        step[u] *= scale[u]


@part
def turn(rotation: np.ndarray, step: np.ndarray, limit: Real, trial: np.ndarray) -> Real:
    """trial = rotation exp([w]x) with |w| cut to limit (rad), columns made orthonormal again; returns |w| uncut."""
    size = math.sqrt(step[0] ** 2 + step[1] ** 2 + step[2] ** 2)
    x, y, z = step[0] / max(size, 1e-30), step[1] / max(size, 1e-30), step[2] / max(size, 1e-30)
    s, c = math.sin(min(size, limit)), math.cos(min(size, limit))
    d = 1 - c
    first = (c + x * x * d, x * y * d + z * s, x * z * d - y * s)
    second = (x * y * d - z * s, c + y * y * d, y * z * d + x * s)
    aa = ab = bb = 0.0
    for i in range(3):
        trial[i, 0] = rotation[i, 0] * first[0] + rotation[i, 1] * first[1] + rotation[i, 2] * first[2]
        trial[i, 1] = rotation[i, 0] * second[0] + rotation[i, 1] * second[1] + rotation[i, 2] * second[2]
        aa, ab = aa + trial[i, 0] ** 2, ab + trial[i, 0] * trial[i, 1]
    for i in range(3):
        trial[i, 1] -= trial[i, 0] * (ab / max(aa, 1e-30))
        bb += trial[i, 1] ** 2
    for i in range(3):
        trial[i, 0] /= math.sqrt(max(aa, 1e-30))
        trial[i, 1] /= math.sqrt(max(bb, 1e-30))
    trial[0, 2] = trial[1, 0] * trial[2, 1] - trial[2, 0] * trial[1, 1]
    trial[1, 2] = trial[2, 0] * trial[0, 1] - trial[0, 0] * trial[2, 1]
    trial[2, 2] = trial[0, 0] * trial[1, 1] - trial[1, 0] * trial[0, 1]
    return size
