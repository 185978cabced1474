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
from scalecryo.physics.kernels.jit import Integer, in_threads, kernel, part, shares_of
from scalecryo.physics.kernels.trigonometry import sine_cosine
from scalecryo.physics.kernels.vectors import add_row, interpolate, interpolate_with_slopes, prefetch
from scalecryo.physics.kernels.views import Gradients, Views, Wanted

# Samples between asking for memory and using it: the volume is far larger than the nearer caches.
_AHEAD = 16

_Pixels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""kx, ky, inside and order of `Geometry`."""
_Rows = tuple[Integer, Integer, Integer, Integer]
_Work = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Where a block of samples falls (fraction, line), and what is found there."""


@part
def _lines(corner: np.ndarray, count: int, box: int, line: np.ndarray) -> None:
    """Where the lower x neighbour lies at (z, y), (z, y+1), (z+1, y), (z+1, y+1): worked out for many at a time."""
    size, width = np.int32(box), np.int32(box // 2 + 1)
    for i in range(count):
        column, near, far = corner[0, i], corner[3, i] * size, corner[4, i] * size
        line[0, i] = (near + corner[1, i]) * width + column
        line[1, i] = (near + corner[2, i]) * width + column
        line[2, i] = (far + corner[1, i]) * width + column
        line[3, i] = (far + corner[2, i]) * width + column


@part
def _at(line: np.ndarray, i: int) -> _Rows:
    """The same of one sample, as places of real numbers."""
    return 2 * np.intp(line[0, i]), 2 * np.intp(line[1, i]), 2 * np.intp(line[2, i]), 2 * np.intp(line[3, i])


@part
def _fetch(array: np.ndarray, line: np.ndarray, later: int) -> None:
    """Ask for the neighbours of a later sample."""
    a, b, c, d = _at(line, later)
    prefetch(array, a)
    prefetch(array, b)
    prefetch(array, c)
    prefetch(array, d)


@part
def _interpolate(volume: np.ndarray, count: int, work: _Work) -> None:
    """Values, conjugated where the Friedel partner was taken."""
    fraction, line, values = work
    for i in range(count):
        _fetch(volume, line, min(i + _AHEAD, count - 1))
        x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
        a, b, c, d = _at(line, i)
        real, imag = interpolate(volume, a, b, c, d, x, y, z)
        values[0, i], values[1, i] = real, imag * fraction[3, i]


@part
def _interpolate_with_slopes(volume: np.ndarray, count: int, work: _Work) -> None:
    """Values as above; rows 2 to 7 the derivatives along x, y, z of the half that was read (real, imaginary)."""
    fraction, line, values = work
    for i in range(count):
        _fetch(volume, line, min(i + _AHEAD, count - 1))
        x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
        a, b, c, d = _at(line, i)
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
    work = np.empty((4, BLOCK), np.float32), np.empty((4, BLOCK), np.int32), np.empty((2, BLOCK), np.float32)
    corner, (fraction, line, values) = np.empty((5, BLOCK), np.int32), work
    for b in range(share, rotation.shape[0], shares):
        contrast = ctf[min(b, ctf.shape[0] - 1)]
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            stop = start + block
            u, v, at = kx[start:stop], ky[start:stop], order[start:stop]
            locate(rotation[b], u, v, box, fraction, corner)
            _lines(corner, block, box, line)
            _interpolate(volume, block, work)
            _to_image(values, contrast, inside[start:stop], at, u, v, moved, turns[b], images[b])


@part
def _to_image(
    values: np.ndarray,
    contrast: np.ndarray,
    inside: np.ndarray,
    order: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    moved: bool,
    turn: np.ndarray,
    image: np.ndarray,
) -> None:
    """From a slice to its place in the image, with contrast and shift."""
    if moved:
        # Apart from the next loop, whose scattered writes keep it from being vectorised.
        for i in range(kx.shape[0]):
            sine, cosine = sine_cosine(kx[i] * turn[0] + ky[i] * turn[1])
            real, imag = values[0, i], values[1, i]
            values[0, i], values[1, i] = real * cosine - imag * sine, real * sine + imag * cosine
    for i in range(kx.shape[0]):
        at = order[i]
        keep = contrast[at] * inside[i]
        image[2 * at], image[2 * at + 1] = values[0, i] * keep, values[1, i] * keep


@kernel
def _differentiate(
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
    wanted: tuple[bool, bool, bool],
    local: np.ndarray,
    for_rotation: np.ndarray,
    for_shift: np.ndarray,
    grid: np.ndarray,
) -> None:
    """One thread's images. wanted: by the rotation, by the shift; and to add to the grid at once, which one thread may.

    local becomes the gradient by the slices, in the order of kx; it keeps as many images as it has room for.
    The sums leave out constant factors: scale^-1 for kx, ky given scaled, and -2 pi / N for the shift.
    """
    kx, ky, inside, order = pixels
    work = np.empty((4, BLOCK), np.float32), np.empty((4, BLOCK), np.int32), np.empty((8, BLOCK), np.float32)
    corner, (fraction, line, values) = np.empty((5, BLOCK), np.int32), work
    mine, every = planes(0, 1, box), np.arange(BLOCK).astype(np.int32)
    for b in range(share, rotation.shape[0], shares):
        contrast, total, row = ctf[min(b, ctf.shape[0] - 1)], np.zeros(8), min(b, local.shape[0] - 1)
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            here, stop = local[row, 2 * start : 2 * (start + block)], start + block
            u, v, at = kx[start:stop], ky[start:stop], order[start:stop]
            _from_image(gradient[b], contrast, inside[start:stop], at, u, v, moved, turns[b], here)
            if not (wanted[0] or wanted[1] or wanted[2]):
                continue
            locate(rotation[b], u, v, box, fraction, corner)
            _lines(corner, block, box, line)
            if wanted[0]:
                _interpolate_with_slopes(volume, block, work)
                _sum_turns(u, v, here, fraction, values, total)
            elif wanted[1]:
                _interpolate(volume, block, work)
            if wanted[1]:
                _sum_moves(u, v, here, values, total)
            if wanted[2]:
                _add_samples(grid, here, fraction, corner, line, mine, every, block)
        for axis in range(3):
            for_rotation[b, axis, 0], for_rotation[b, axis, 1] = total[2 * axis], total[2 * axis + 1]
        for_shift[b, 0], for_shift[b, 1] = total[6], total[7]


@part
def _from_image(
    gradient: np.ndarray,
    contrast: np.ndarray,
    inside: np.ndarray,
    order: np.ndarray,
    kx: np.ndarray,
    ky: np.ndarray,
    moved: bool,
    turn: np.ndarray,
    local: np.ndarray,
) -> None:
    """From the gradient by an image to that by its slice: contrast and shift undone, in the order of kx."""
    for i in range(kx.shape[0]):
        at = order[i]
        keep = contrast[at] * inside[i]
        local[2 * i], local[2 * i + 1] = gradient[2 * at] * keep, gradient[2 * at + 1] * keep
    if moved:
        for i in range(kx.shape[0]):
            sine, cosine = sine_cosine(kx[i] * turn[0] + ky[i] * turn[1])
            real, imag = local[2 * i], local[2 * i + 1]
            local[2 * i], local[2 * i + 1] = real * cosine + imag * sine, imag * cosine - real * sine


@part
def _sum_turns(
    kx: np.ndarray, ky: np.ndarray, local: np.ndarray, fraction: np.ndarray, values: np.ndarray, total: np.ndarray
) -> None:
    zero = np.float32(0)
    xx = xy = yx = yy = zx = zy = zero
    for i in range(kx.shape[0]):
        # For a Friedel partner -q the chain rule brings one minus sign, the conjugate another.
        real, imag = local[2 * i] * fraction[3, i], local[2 * i + 1]
        x = real * values[2, i] + imag * values[3, i]
        y = real * values[4, i] + imag * values[5, i]
        z = real * values[6, i] + imag * values[7, i]
        u, v = kx[i], ky[i]
        xx, xy, yx, yy, zx, zy = xx + x * u, xy + x * v, yx + y * u, yy + y * v, zx + z * u, zy + z * v
    sums = (xx, xy, yx, yy, zx, zy)
    for m in range(6):
        total[m] += sums[m]


@part
def _sum_moves(kx: np.ndarray, ky: np.ndarray, local: np.ndarray, values: np.ndarray, total: np.ndarray) -> None:
    x = y = np.float32(0)
    for i in range(kx.shape[0]):
        along = values[0, i] * local[2 * i + 1] - values[1, i] * local[2 * i]
        x, y = x + along * kx[i], y + along * ky[i]
    total[6] += x
    total[7] += y


@part
def _add_samples(
    grid: np.ndarray,
    local: np.ndarray,
    fraction: np.ndarray,
    corner: np.ndarray,
    line: np.ndarray,
    mine: np.ndarray,
    todo: np.ndarray,
    count: int,
) -> None:
    """Add a block's listed samples to the planes that are this thread's. grid, local: pairs of real numbers."""
    for j in range(count):
        i = todo[j]
        _fetch(grid, line, todo[min(j + _AHEAD, count - 1)])
        x, y, z = fraction[0, i], fraction[1, i], fraction[2, i]
        real, imag = local[2 * i], local[2 * i + 1] * fraction[3, i]
        a, b, c, d = _at(line, i)
        if mine[corner[3, i]]:
            near = np.float32(1) - z
            r, m = real * near, imag * near
            add_row(grid, a, r - r * y, m - m * y, x)
            add_row(grid, b, r * y, m * y, x)
        if mine[corner[4, i]]:
            r, m = real * z, imag * z
            add_row(grid, c, r - r * y, m - m * y, x)
            add_row(grid, d, r * y, m * y, x)


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
    mine, todo, line = planes(share, shares, box), np.empty(BLOCK + 1, np.int32), np.empty((4, BLOCK), np.int32)
    for b in range(rotation.shape[0]):
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            locate(rotation[b], kx[start : start + block], ky[start : start + block], box, fraction, corner)
            _lines(corner, block, box, line)
            here = list_mine(mine, corner, block, todo)
            _add_samples(grid, local[b, 2 * start :], fraction, corner, line, mine, todo, here)


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
    alone = shares_of(samples) == 1
    local = np.empty((1 if alone else len(rotation), arriving.shape[1]), np.float32)
    for_rotation, for_shift = torch.zeros(len(rotation), 3, 3), torch.zeros(len(rotation), 2)
    grid = torch.zeros_like(volume, memory_format=torch.contiguous_format) if wanted.volume else volume.new_empty(0)
    sums = _pairs(grid)
    asked = wanted.rotation, wanted.shift, wanted.volume and alone
    found = local, for_rotation.numpy(), for_shift.numpy(), sums
    in_threads(_differentiate, samples, _pairs(volume), box, *seen, arriving, asked, *found)
    if wanted.volume and not alone:
        in_threads(_scatter, samples, local, rotation, kx, ky, box, sums)
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
