"""The slice operator on the CPU, compiled by numba: the semantics of `kernels.reference`.

Single precision. Pixels are worked on in blocks: a vectorised pass finds where they fall, a second one reads or adds to
the eight neighbours. Adding to a volume gives every thread planes of its own, so it needs no atomics and every voxel
receives its samples in the same order: results are the same, bit for bit, for any number of threads.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex
from torch import Tensor

from scalecryo.physics.kernels.cpu_location import BLOCK, array, geometry, list_mine, locate, planes
from scalecryo.physics.kernels.jit import Integer, in_threads, kernel, part
from scalecryo.physics.kernels.trigonometry import sine_cosine
from scalecryo.physics.kernels.vectors import add_row, interpolate, interpolate_with_slopes, prefetch
from scalecryo.physics.kernels.views import Gradients, Views, Wanted

# Samples between asking for memory and using it: the volume is far larger than the nearer caches.
_AHEAD = 16

_Pixels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""kx, ky, inside and order of `Geometry`."""
_Rows = tuple[Integer, Integer, Integer, Integer]
_Work = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Where a block of samples falls (fraction, corner), and what is found there."""


@part
def _corners(corner: np.ndarray, i: int, box: int) -> _Rows:
    """Where the real part of the lower x neighbour lies at (z, y), (z, y+1), (z+1, y), (z+1, y+1)."""
    width, column = box // 2 + 1, np.intp(corner[0, i])
    low, high = np.intp(corner[1, i]), np.intp(corner[2, i])
    near, far = np.intp(corner[3, i]) * box, np.intp(corner[4, i]) * box
    return (
        2 * ((near + low) * width + column),
        2 * ((near + high) * width + column),
        2 * ((far + low) * width + column),
        2 * ((far + high) * width + column),
    )


@part
def _fetch(array: np.ndarray, corner: np.ndarray, later: int, box: int) -> None:
    """Ask for the neighbours of a later sample."""
    a, b, c, d = _corners(corner, later, box)
    prefetch(array, a)
    prefetch(array, b)
    prefetch(array, c)
    prefetch(array, d)


@part
def _interpolate(volume: np.ndarray, box: int, count: int, work: _Work) -> None:
    """Values, conjugated where the mate was taken."""
    fraction, corner, values = work
    for i in range(count):
        _fetch(volume, corner, min(i + _AHEAD, count - 1), box)
        x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
        a, b, c, d = _corners(corner, i, box)
        real, imag = interpolate(volume, a, b, c, d, x, y, z)
        values[0, i], values[1, i] = real, imag * fraction[3, i]


@part
def _interpolate_with_slopes(volume: np.ndarray, box: int, count: int, work: _Work) -> None:
    """Values as above; rows 2 to 7 the derivatives along x, y, z of the half that was read (real, imaginary)."""
    fraction, corner, values = work
    for i in range(count):
        _fetch(volume, corner, min(i + _AHEAD, count - 1), box)
        x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
        a, b, c, d = _corners(corner, i, box)
        found = interpolate_with_slopes(volume, a, b, c, d, x, y, z)
        values[0, i], values[1, i], values[2, i], values[3, i] = found[0], found[1] * fraction[3, i], found[2], found[3]
        values[4, i], values[5, i], values[6, i], values[7, i] = found[4], found[5], found[6], found[7]


@kernel
def _extract(
    share: int,
    shares: int,
    volume: np.ndarray,
    box: int,
    rotation: np.ndarray,
    moved: bool,
    turns: np.ndarray,
    ctf: np.ndarray,
    pixels: _Pixels,
    images: np.ndarray,
) -> None:
    """One thread's images: every `shares`-th. volume, images: pairs of real numbers. turns: -shift / (N scale)."""
    kx, ky, inside, order = pixels
    work = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32), np.empty((2, BLOCK), np.float32)
    values, count = work[2], kx.shape[0]
    for b in range(share, rotation.shape[0], shares):
        contrast, (turn_x, turn_y) = ctf[min(b, ctf.shape[0] - 1)], turns[b]
        for start in range(0, count, BLOCK):
            block = min(BLOCK, count - start)
            locate(rotation[b], kx, ky, start, block, box, work[0], work[1])
            _interpolate(volume, box, block, work)
            for i in range(block):
                p, at = start + i, order[start + i]
                keep = contrast[at] * inside[p]
                real, imag = values[0, i] * keep, values[1, i] * keep
                if moved:
                    sine, cosine = sine_cosine(kx[p] * turn_x + ky[p] * turn_y)
                    real, imag = real * cosine - imag * sine, real * sine + imag * cosine
                images[b, 2 * at], images[b, 2 * at + 1] = real, imag


@kernel
def _pose_gradient(
    share: int,
    shares: int,
    volume: np.ndarray,
    box: int,
    rotation: np.ndarray,
    moved: bool,
    turns: np.ndarray,
    ctf: np.ndarray,
    pixels: _Pixels,
    gradient: np.ndarray,
    wanted: tuple[bool, bool],
    local: np.ndarray,
    for_rotation: np.ndarray,
    for_shift: np.ndarray,
) -> None:
    """One thread's images. wanted: by the rotation, by the shift.

    local becomes the gradient by the slices, in the order of kx.
    The sums leave out constant factors: scale^-1 for kx, ky given scaled, and -2 pi / N for the shift.
    """
    kx, ky, inside, order = pixels
    work = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32), np.empty((8, BLOCK), np.float32)
    fraction, values = work[0], work[2]
    for b in range(share, rotation.shape[0], shares):
        contrast, (turn_x, turn_y) = ctf[min(b, ctf.shape[0] - 1)], turns[b]
        total = np.zeros(8)
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            for i in range(block):
                p, at = start + i, order[start + i]
                keep = contrast[at] * inside[p]
                real, imag = gradient[b, 2 * at] * keep, gradient[b, 2 * at + 1] * keep
                if moved:
                    sine, cosine = sine_cosine(kx[p] * turn_x + ky[p] * turn_y)
                    real, imag = real * cosine + imag * sine, imag * cosine - real * sine
                local[b, 2 * p], local[b, 2 * p + 1] = real, imag
            if not (wanted[0] or wanted[1]):
                continue
            locate(rotation[b], kx, ky, start, block, box, fraction, work[1])
            if wanted[0]:
                _interpolate_with_slopes(volume, box, block, work)
                _sum_turns(kx, ky, start, block, local[b], fraction, values, total)
            else:
                _interpolate(volume, box, block, work)
            if wanted[1]:
                _sum_moves(kx, ky, start, block, local[b], values, total)
        for axis in range(3):
            for_rotation[b, axis, 0], for_rotation[b, axis, 1] = total[2 * axis], total[2 * axis + 1]
        for_shift[b, 0], for_shift[b, 1] = total[6], total[7]


@part
def _sum_turns(
    kx: np.ndarray,
    ky: np.ndarray,
    start: int,
    count: int,
    local: np.ndarray,
    fraction: np.ndarray,
    values: np.ndarray,
    total: np.ndarray,
) -> None:
    zero = np.float32(0)
    xx = xy = yx = yy = zx = zy = zero
    for i in range(count):
        p = start + i
        # For a mate -q the chain rule brings one minus sign, the conjugate another.
        real, imag = local[2 * p] * fraction[3, i], local[2 * p + 1]
        x = real * values[2, i] + imag * values[3, i]
        y = real * values[4, i] + imag * values[5, i]
        z = real * values[6, i] + imag * values[7, i]
        u, v = kx[p], ky[p]
        xx, xy, yx, yy, zx, zy = xx + x * u, xy + x * v, yx + y * u, yy + y * v, zx + z * u, zy + z * v
    sums = (xx, xy, yx, yy, zx, zy)
    for m in range(6):
        total[m] += sums[m]


@part
def _sum_moves(
    kx: np.ndarray, ky: np.ndarray, start: int, count: int, local: np.ndarray, values: np.ndarray, total: np.ndarray
) -> None:
    x = y = np.float32(0)
    for i in range(count):
        p = start + i
        along = values[0, i] * local[2 * p + 1] - values[1, i] * local[2 * p]
        x, y = x + along * kx[p], y + along * ky[p]
    total[6] += x
    total[7] += y


@kernel
def _scatter(
    share: int,
    shares: int,
    local: np.ndarray,
    rotation: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    box: int,
    grid: np.ndarray,
) -> None:
    """Every image, but only one thread's planes, in runs dealt round. local, grid: pairs of real numbers."""
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    mine, todo = planes(share, shares, box), np.empty(BLOCK + 1, np.int32)
    width, count = box // 2 + 1, kx.shape[0]
    for b in range(rotation.shape[0]):
        for start in range(0, count, BLOCK):
            block = min(BLOCK, count - start)
            locate(rotation[b], kx, ky, start, block, box, fraction, corner)
            mine_here = list_mine(mine, corner, block, todo)
            for j in range(mine_here):
                i = todo[j]
                _fetch(grid, corner, todo[min(j + _AHEAD, mine_here - 1)], box)
                x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
                low, high, column = np.intp(corner[1, i]), np.intp(corner[2, i]), np.intp(corner[0, i])
                at = 2 * (start + i)
                real, imag = local[b, at], local[b, at + 1] * fraction[3, i]
                for plane, near in ((corner[3, i], np.float32(1) - z), (corner[4, i], z)):
                    if mine[plane]:
                        r, m = real * near, imag * near
                        top, bottom = (plane * box + low) * width + column, (plane * box + high) * width + column
                        add_row(grid, 2 * top, r - r * y, m - m * y, x)
                        add_row(grid, 2 * bottom, r * y, m * y, x)


def forward(volume: Complex[Tensor, "d d h"], views: Views) -> Complex[Tensor, "b p"]:
    """As `kernels.reference.forward`, single precision on the CPU."""
    images = torch.empty(len(views.rotation), len(views.kx), dtype=torch.complex64)
    values = torch.view_as_real(images).flatten(1).numpy()
    in_threads(_extract, images.numel(), _pairs(volume), volume.shape[0], *_seen(volume, views), values)
    return images


def backward(
    gradient: Complex[Tensor, "b p"], volume: Complex[Tensor, "d d h"], views: Views, wanted: Wanted
) -> Gradients:
    """As `kernels.reference.backward`. Bit for bit the same for any number of threads."""
    box, samples, seen = volume.shape[0], gradient.numel(), _seen(volume, views)
    rotation, (kx, ky, _, _) = seen[0], seen[4]
    arriving = torch.view_as_real(gradient.resolve_conj().contiguous()).flatten(1).numpy()
    local = np.empty_like(arriving)
    for_rotation, for_shift = torch.zeros(len(rotation), 3, 3), torch.zeros(len(rotation), 2)
    found = local, for_rotation.numpy(), for_shift.numpy()
    flat = _pairs(volume)
    in_threads(_pose_gradient, samples, flat, box, *seen, arriving, (wanted.rotation, wanted.shift), *found)
    grid = torch.zeros_like(volume, memory_format=torch.contiguous_format) if wanted.volume else volume.new_empty(0)
    if wanted.volume:
        in_threads(_scatter, samples, local, rotation, kx, ky, box, torch.view_as_real(grid).numpy().ravel())
    for_shift *= -2 * math.pi / (views.box_size * views.scale)
    nothing = for_shift[:0, 0]
    given = for_rotation if wanted.rotation else nothing.clone(), for_shift if wanted.shift else nothing.clone()
    return Gradients(grid, *(values.to(views.rotation.dtype) for values in given))


def _pairs(values: Tensor) -> np.ndarray:
    """Flat, real and imaginary parts in turn."""
    return torch.view_as_real(values.detach().resolve_conj().contiguous()).numpy().ravel()


def _seen(volume: Tensor, views: Views) -> tuple[Any, ...]:
    """Rotation, whether there are shifts, turns, CTF and pixels, as the kernels take them."""
    rotation, shift_px, ctf, kx, ky, scale, box_size = views
    turned, *pixels = geometry(rotation, kx, ky, scale, volume.shape[0])
    moved = shift_px is not None
    turns = np.zeros((len(rotation), 2), np.float32)
    if shift_px is not None:
        turns[:] = array(shift_px.float() * (-1 / (box_size * scale)))
    contrast = np.ones((1, len(kx)), np.float32) if ctf is None else array(ctf.float())
    return turned, moved, turns, contrast, tuple(pixels)
