"""Where samples fall, and which thread owns which planes: parts of the CPU's slice and insertion kernels.

numba notices changes here only when the kernels' own files change too: touch them.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalecryo.physics.fft import check_even_box
from scalecryo.physics.kernels.jit import part

BLOCK = 256
# Planes that go to the same thread: long runs split fewer samples over two threads, short ones balance better.
_SLAB = 8


@part
def locate(
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    box: int,
    fraction: np.ndarray,
    corner: np.ndarray,
) -> None:
    """Where a block of samples falls. kx, ky: of this block, for numba makes gathers of kx[start + i].

    fraction: x, y, z between neighbours and the sign (-1: the Friedel partner -q was taken). corner: x, then y, y+1, z,
    z+1 as stored rows and planes.
    """
    half, size = np.float32(box // 2), np.int32(box)
    zero, one = np.float32(0), np.float32(1)
    xx, xy, yx, yy = rotation[0, 0], rotation[0, 1], rotation[1, 0], rotation[1, 1]
    zx, zy = rotation[2, 0], rotation[2, 1]
    for i in range(kx.shape[0]):
        u, v = kx[i], ky[i]
        x, y, z = xx * u + xy * v, yx * u + yy * v, zx * u + zy * v
        sign = np.copysign(one, x)
        x, y, z = x * sign, y * sign, z * sign
        # No effect on rotations: this keeps everything else within the arrays, NaN too (no comparison with it holds).
        low_x, low_y, low_z = np.floor(x), np.floor(y), np.floor(z)
        low_x = low_x if low_x > zero else zero
        low_y = low_y if low_y > -half else -half
        low_z = low_z if low_z > -half else -half
        low_x = low_x if low_x < half - one else half - one
        low_y = low_y if low_y < half - one else half - one
        low_z = low_z if low_z < half - one else half - one
        fraction[0, i], fraction[1, i], fraction[2, i], fraction[3, i] = x - low_x, y - low_y, z - low_z, sign
        row, plane = np.int32(low_y), np.int32(low_z)
        corner[0, i] = np.int32(low_x)
        corner[1, i] = row + size if row < 0 else row
        corner[2, i] = row + 1 + size if row < -1 else row + 1
        corner[3, i] = plane + size if plane < 0 else plane
        corner[4, i] = plane + 1 + size if plane < -1 else plane + 1


@part
def planes(share: int, shares: int, box: int) -> np.ndarray:
    """Which planes a thread owns."""
    mine = np.empty(box, np.int32)
    for z_plane in range(box):
        mine[z_plane] = (z_plane // _SLAB) % shares == share
    return mine


@part
def list_mine(mine: np.ndarray, corner: np.ndarray, count: int, todo: np.ndarray) -> int:
    """Samples that touch a plane of this thread: listed first, without branches, which could not be predicted."""
    found = 0
    for i in range(count):
        todo[found] = i
        found += mine[corner[3, i]] | mine[corner[4, i]]
    return found


class Geometry(NamedTuple):
    """Poses, and the pixels in the order in which they are worked on."""

    rotation: np.ndarray
    kx: np.ndarray
    """Times scale."""
    ky: np.ndarray
    inside: np.ndarray
    """1 where |k| scale <= box/2 - 1, else 0."""
    order: np.ndarray
    """Where each of these pixels is packed."""


def geometry(rotation: Tensor, kx: Tensor, ky: Tensor, scale: float, box: int) -> Geometry:
    """Line by line, so that neighbouring samples share their voxels, which packing by radius scatters.

    Raises:
        InputError: an odd box.
    """
    return Geometry(array(rotation.float()), *_ordered(_Seen.of(kx), _Seen.of(ky), scale, box))


@dataclass(frozen=True)
class _Seen:
    """A tensor, equal to any other that reads the same memory; as long as it is kept, nothing else can lie there."""

    tensor: Tensor = field(compare=False)
    memory: tuple[Hashable, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Seen":
        # Writing to a tensor raises its version; one made in inference mode has none, and equals nothing.
        version = object() if tensor.is_inference() else tensor._version
        return cls(tensor, (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version))


@lru_cache(maxsize=8)
def _ordered(kx: _Seen, ky: _Seen, scale: float, box: int) -> tuple[np.ndarray, ...]:
    """All of `Geometry` but the poses: the same for every step, and at low resolution a seventh of the work."""
    x, y, inside = scaled_pixels(kx.tensor, ky.tensor, scale, box)
    order = np.lexsort((x, y)).astype(np.int32)
    return x[order], y[order], inside[order], order


def scaled_pixels(kx: Tensor, ky: Tensor, scale: float, box: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """kx and ky times scale, in single precision, and 1 where they lie within the transform, else 0.

    Raises:
        InputError: an odd box.
    """
    check_even_box(box)
    x, y = scale * kx.float(), scale * ky.float()
    return array(x), array(y), array((torch.hypot(x, y) <= box // 2 - 1 + 1e-4).float())


def array(tensor: Tensor) -> np.ndarray:
    """Contiguous, without conjugation left to do."""
    return tensor.detach().resolve_conj().contiguous().numpy()
