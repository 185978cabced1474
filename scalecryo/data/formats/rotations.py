"""Rotation matrices of tables in NumPy; conventions as in `physics/rotation.py`, which does the same in PyTorch.

Tables of 10⁷ rows are read by processes that need no PyTorch, and the closed form takes half the time of quaternions.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DEGENERATE = 1e-7  # radians of tilt from 0 or 180 degrees
_AT_ONCE = 50_000  # rows: what is made on the way is twenty times the result


def euler_to_matrix(angles_deg: npt.NDArray[np.floating]) -> Floats:
    """R = Rz(rot) Ry(tilt) Rz(psi), (n, 3, 3), of RELION's (rot, tilt, psi) in degrees, (n, 3)."""
    (c1, c2, c3), (s1, s2, s3) = (f(np.deg2rad(angles_deg, dtype=np.float64).T) for f in (np.cos, np.sin))
    rotation = np.empty((len(angles_deg), 3, 3))
    rotation[:, 0, 0], rotation[:, 0, 1], rotation[:, 0, 2] = c1 * c2 * c3 - s1 * s3, -c1 * c2 * s3 - s1 * c3, c1 * s2
    rotation[:, 1, 0], rotation[:, 1, 1], rotation[:, 1, 2] = s1 * c2 * c3 + c1 * s3, -s1 * c2 * s3 + c1 * c3, s1 * s2
    rotation[:, 2, 0], rotation[:, 2, 1], rotation[:, 2, 2] = -s2 * c3, s2 * s3, c2
    return rotation


def vector_to_matrix(vector: npt.NDArray[np.floating]) -> Floats:
    """R, (n, 3, 3), of rotation vectors in radians, (n, 3), by Rodrigues' formula."""
    x, y, z = np.asarray(vector, dtype=np.float64).T
    angle = np.sqrt(x * x + y * y + z * z)
    zero = np.zeros_like(x)
    cross = np.array([[zero, -z, y], [z, zero, -x], [-y, x, zero]]).transpose(2, 0, 1)
    sine, versine = np.sinc(angle / np.pi), 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    rotation: Floats = np.eye(3) + sine[:, None, None] * cross + versine[:, None, None] * (cross @ cross)
    return rotation


def matrix_to_quaternion(rotation: npt.NDArray[np.floating]) -> Floats:
    """Unit quaternions, (n, 4) as x, y, z, w, of R; of nearly orthogonal matrices too (Markley 2008)."""
    (a, d, g), (b, e, h), (c, f, i) = np.asarray(rotation, dtype=np.float64).transpose(2, 1, 0)
    products = np.array([  # 4 q qᵀ
        [1 + a - e - i, b + d, c + g, h - f],
        [b + d, 1 + e - i - a, f + h, c - g],
        [c + g, f + h, 1 + i - a - e, d - b],
        [h - f, c - g, d - b, 1 + a + e + i],
    ])  # fmt: skip
    largest = np.diagonal(products).argmax(axis=1)
    row: Floats = products[largest, :, np.arange(len(largest))]
    return row / np.linalg.norm(row, axis=1, keepdims=True)


def matrix_to_euler(rotation: npt.NDArray[np.floating]) -> Floats:
    """RELION's (rot, tilt, psi), (n, 3), in degrees: tilt in [0, 180], the others in [-180, 180].

    At tilt 0 or 180, where only one combination of rot and psi is defined, psi is 0.
    """
    return _in_parts(_quaternion_to_euler, rotation)


def matrix_to_vector(rotation: npt.NDArray[np.floating]) -> Floats:
    """Rotation vectors of R, (n, 3), radians, of length at most π."""
    return _in_parts(_quaternion_to_vector, rotation)


def _in_parts(form: Callable[[Floats], Floats], rotation: npt.NDArray[np.floating]) -> Floats:
    """Three numbers of each rotation, from its quaternion."""
    found = np.empty((len(rotation), 3))
    for start in range(0, len(rotation), _AT_ONCE):
        found[start : start + _AT_ONCE] = form(matrix_to_quaternion(rotation[start : start + _AT_ONCE]))
    return found


def _quaternion_to_euler(quaternion: Floats) -> Floats:
    x, y, z, w = quaternion.T
    tilt = 2 * np.arctan2(np.hypot(x, y), np.hypot(z, w))
    half_sum, half_difference = np.arctan2(z, w), np.arctan2(-x, y)
    rot, psi = half_sum + half_difference, half_sum - half_difference
    flat, over = np.abs(tilt) <= _DEGENERATE, np.abs(tilt - np.pi) <= _DEGENERATE
    rot = np.where(flat, 2 * half_sum, np.where(over, 2 * half_difference, rot))
    psi = np.where(flat | over, 0.0, psi)
    rot, psi = (np.where(turn < -np.pi, turn + 2 * np.pi, turn) for turn in (rot, psi))
    rot, psi = (np.where(turn > np.pi, turn - 2 * np.pi, turn) for turn in (rot, psi))
    return np.rad2deg(np.stack([rot, tilt, psi], axis=-1))


def _quaternion_to_vector(quaternion: Floats) -> Floats:
    quaternion = quaternion * np.where(quaternion[:, 3:] > 0, 1.0, -1.0)
    half_angle = np.arctan2(np.linalg.norm(quaternion[:, :3], axis=1), quaternion[:, 3])
    vector: Floats = quaternion[:, :3] * (2 / np.sinc(half_angle / np.pi))[:, None]
    return vector
