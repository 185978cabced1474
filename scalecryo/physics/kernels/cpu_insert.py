"""Insertion of slices on the CPU, compiled by numba: the semantics of `fourier_slice.insert_slices`.

Single precision. A padded grid is far larger than the cache, and a slice crosses all of it: added one by one, samples
wait for memory. So the samples of many images are first dealt into columns of the grid (square in y and z, all of x),
each column is summed up in a buffer that fits the cache, and is then added to the grid in one sweep.

Columns reach one voxel into the next ones. Threads take rows of columns, the even ones first, then the odd ones: this
needs no atomics, and every voxel receives its samples in the same order. Results are the same, bit for bit, for any
number of threads.
"""

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.kernels.cpu_location import BLOCK, array, locate, scaled_pixels
from scalecryo.physics.kernels.jit import Integer, in_threads, kernel, part
from scalecryo.physics.kernels.trigonometry import sine_cosine
from scalecryo.physics.kernels.vectors import add_record

# Samples that are dealt out at once: 128 MiB of records.
_SAMPLES_AT_ONCE = 4 << 20
# A column's buffer must fit the second-level cache.
_BUFFER_BYTES = 640 << 10
# A record is what a sample adds (real, imaginary, weight, nothing), where it falls (x, y, z between neighbours), and
# the voxel of the column's buffer that this is counted from (an integer, seen through a view).
_RECORD, _VOXEL = 8, 7

_Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""values, power, weight, turns: `insert_slices_cpu`; turns is shift / (N scale)."""
_Pixels = tuple[np.ndarray, np.ndarray, np.ndarray]
"""kx, ky (times scale), weight."""


@part
def _bounds(share: int, shares: int, count: int) -> tuple[int, int]:
    """The run of images that is this thread's."""
    return share * count // shares, (share + 1) * count // shares


@part
def _columns(corner: np.ndarray, count: int, box: int, bits: int, column: np.ndarray, voxel: np.ndarray) -> None:
    """Which column, 2^bits wide, a sample's lowest neighbour lies in, and which voxel of its buffer that is."""
    half, size, width, zero = np.int32(box // 2), np.int32(box), np.int32(box // 2 + 1), np.int32(0)
    shift, low = np.int32(bits), np.int32((1 << bits) - 1)
    across, rows = np.int32(((box - 1) >> bits) + 1), np.int32((1 << bits) + 1)
    for i in range(count):
        y, z = corner[1, i] + half, corner[3, i] + half
        y, z = y - (size if y >= size else zero), z - (size if z >= size else zero)
        column[i] = (z >> shift) * across + (y >> shift)
        voxel[i] = ((z & low) * rows + (y & low)) * width + corner[0, i]


@kernel
def _count(
    share: int,
    shares: int,
    weight: np.ndarray,
    rotation: np.ndarray,
    pixels: _Pixels,
    box: int,
    bits: int,
    counts: np.ndarray,
) -> None:
    """counts[share]: samples of this thread's images in each column."""
    (kx, ky, _), (first, last) = pixels, _bounds(share, shares, rotation.shape[0])
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    column, voxel = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    for b in range(first, last):
        if weight[b] == 0:
            continue
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            locate(rotation[b], kx[start : start + block], ky[start : start + block], box, fraction, corner)
            _columns(corner, block, box, bits, column, voxel)
            for i in range(block):
                counts[share, column[i]] += 1


@kernel
def _deal(
    share: int,
    shares: int,
    images: _Images,
    rotation: np.ndarray,
    pixels: _Pixels,
    box: int,
    bits: int,
    starts: np.ndarray,
    records: np.ndarray,
    places: np.ndarray,
) -> None:
    """Write this thread's records. starts[share]: where the next one of each column goes. places: records as int32."""
    (values, power, weight, turns), (kx, ky, pixel_weight) = images, pixels
    fraction, corner = np.empty((4, BLOCK), np.float32), np.empty((5, BLOCK), np.int32)
    column, voxel, wave = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32), np.empty((2, BLOCK), np.float32)
    first, last = _bounds(share, shares, rotation.shape[0])
    for b in range(first, last):
        if weight[b] == 0:
            continue
        observed, ctf, (turn_x, turn_y) = values[b], power[min(b, power.shape[0] - 1)], turns[b]
        for start in range(0, kx.shape[0], BLOCK):
            block = min(BLOCK, kx.shape[0] - start)
            stop = start + block
            u, v, pixel, power_here = kx[start:stop], ky[start:stop], observed[start:stop], ctf[start:stop]
            share_here = pixel_weight[start:stop]
            locate(rotation[b], u, v, box, fraction, corner)
            _columns(corner, block, box, bits, column, voxel)
            for i in range(block):
                wave[0, i], wave[1, i] = sine_cosine(u[i] * turn_x + v[i] * turn_y)
            for i in range(block):
                share_of_it, sine, cosine, value = weight[b] * share_here[i], wave[0, i], wave[1, i], pixel[i]
                at = starts[share, column[i]]
                starts[share, column[i]] = at + 1
                to = np.uintp(_RECORD * at)
                records[to] = (value.real * cosine - value.imag * sine) * share_of_it
                imag = (value.real * sine + value.imag * cosine) * share_of_it
                records[to + np.uintp(1)] = imag * fraction[3, i]
                records[to + np.uintp(2)], records[to + np.uintp(3)] = power_here[i] * share_of_it, np.float32(0)
                for axis in range(3):
                    records[to + np.uintp(4 + axis)] = fraction[axis, i]
                places[to + np.uintp(_VOXEL)] = voxel[i]


@part
def _add_buffer(
    buffer: np.ndarray, first: tuple[Integer, Integer], side: int, numerator: np.ndarray, denominator: np.ndarray
) -> None:
    """Add a column's buffer to the grids. first: its lowest z and y, counted from -box/2."""
    box, width = denominator.shape[0], denominator.shape[2]
    for depth in range(side + 1):
        for height in range(side + 1):
            z, y = first[0] + depth, first[1] + height
            if z > box or y > box:
                continue
            # Nothing falls on row and plane `box` itself, the far side of the Nyquist planes, but as a neighbour.
            plane, line = (z + box // 2) % box, (y + box // 2) % box
            row = (depth * (side + 1) + height) * width * 4
            sums, weights = numerator[plane, line], denominator[plane, line]
            for x in range(width):
                sums[2 * x] += buffer[row + 4 * x]
                sums[2 * x + 1] += buffer[row + 4 * x + 1]
                weights[x] += buffer[row + 4 * x + 2]


@kernel
def _sum_columns(
    share: int,
    shares: int,
    parity: int,
    ends: np.ndarray,
    side: int,
    records: np.ndarray,
    places: np.ndarray,
    numerator: np.ndarray,
    denominator: np.ndarray,
) -> None:
    """Every other row of columns, dealt round over threads. ends: where each column's records end."""
    box, width = denominator.shape[0], denominator.shape[2]
    across, line = -(-box // side), 4 * width
    buffer = np.empty((side + 1) * (side + 1) * line, np.float32)
    for row in range(parity + 2 * share, across, 2 * shares):
        for number in range(row * across, (row + 1) * across):
            first = ends[number - 1] if number else 0
            if ends[number] == first:
                continue
            buffer[:] = 0
            for at in range(first, ends[number]):
                voxel = np.intp(places[_RECORD * at + _VOXEL])
                add_record(buffer, 4 * voxel, line, (side + 1) * line, records, _RECORD * at)
            _add_buffer(buffer, (row * side, (number % across) * side), side, numerator, denominator)


def _require(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} is {found}: the compiled kernels take {dtype} on the CPU; convert it")


def _check(tensors: dict[str, Tensor], rotation: Tensor, pixels: int) -> None:
    """Refuse what the kernels would read or write beyond its end."""
    for name, tensor in tensors.items():
        _require(tensor, torch.complex64 if name in ("values", "numerator") else torch.float32, name)
    box, images = tensors["numerator"].shape[0], len(rotation)
    needed = {"values": (images, pixels), "weight": (images,), "pixel_weight": (pixels,), "shift_px": (images, 2)}
    for name, shape in needed.items():
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise InputError(f"{name} has shape {found}: {images} rotations and {pixels} pixels need {shape}")
    if tuple(tensors["power"].shape) not in ((images, pixels), (1, pixels)):
        found = tuple(tensors["power"].shape)
        raise InputError(f"power has shape {found}: {images} rotations and {pixels} pixels need one row each, or one")
    shape = (box, box, box // 2 + 1)
    for name in ("numerator", "denominator"):
        if tuple(tensors[name].shape) != shape or not tensors[name].is_contiguous() or tensors[name].is_conj():
            raise InputError(f"{name} has shape {tuple(tensors[name].shape)}: give a contiguous grid of shape {shape}")
    if not bool((rotation.abs() <= 2).all()):
        raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")


def insert_slices_cpu(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "#b p"],
    weight: Float[Tensor, " b"],
    pixel_weight: Float[Tensor, " p"],
    rotation: Float[Tensor, "b 3 3"],
    shift_px: Float[Tensor, "b 2"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    box_size: int,
    numerator: Complex[Tensor, "d d h"],
    denominator: Float[Tensor, "d d h"],
) -> None:
    """Add centred slices and their weights to two grids in place: a map's numerator and denominator.

    To the numerator `fourier_slice.insert_slices` of values * exp(2 pi i k.shift / N) * weight * pixel_weight, to the
    denominator that of power * weight * pixel_weight; both rounded in single precision. Images of weight 0 cost
    nothing. The result does not depend on the number of threads.

    Args:
        values: complex64.
        power: float32, what goes into the denominator; one row for all images, or one each.
        weight: of each image.
        pixel_weight: of each pixel.
        rotation: image frame to volume frame; double precision is rounded to single.
        shift_px: (x, y), where the content stands, px: it is brought back to the centre.
        kx: cycles per image box.
        ky: cycles per image box.
        box_size: image box, px; the grids' box d over it is the scale.
        numerator: contiguous complex64, added to.
        denominator: contiguous float32, added to.

    Raises:
        InputError: another dtype or device, arrays of the wrong shape, grids that are not contiguous, an odd box,
            rotations that are none.
    """
    given = {"values": values, "power": power, "weight": weight, "pixel_weight": pixel_weight, "shift_px": shift_px}
    _check({**given, "numerator": numerator, "denominator": denominator}, rotation, len(kx))
    box = numerator.shape[0]
    x, y, inside = scaled_pixels(kx, ky, box / box_size, box)
    pixels, grids = (x, y, array(pixel_weight) * inside), (torch.view_as_real(numerator).flatten(2).numpy(),
                                                           denominator.numpy())  # fmt: skip
    turns = array(shift_px) * np.float32(1 / box)
    step = max(1, _SAMPLES_AT_ONCE // max(1, len(kx)))
    for first in range(0, len(rotation), step):
        some = slice(first, first + step)
        ctf = power[some] if len(power) > 1 else power
        images = array(values[some]), array(ctf), array(weight[some]), turns[some]
        _insert(images, array(rotation[some].float()), pixels, *grids)


def _insert(
    images: _Images, rotation: np.ndarray, pixels: _Pixels, numerator: np.ndarray, denominator: np.ndarray
) -> None:
    """Deal the samples into columns, and sum these up."""
    box, samples = len(denominator), images[0].size
    bits = next(n for n in (4, 3, 2, 1) if 16 * ((1 << n) + 1) ** 2 * (box // 2 + 1) <= _BUFFER_BYTES or n == 1)
    side = 1 << bits
    columns = (-(-box // side)) ** 2
    counts = np.zeros((torch.get_num_threads(), columns), np.int64)
    in_threads(_count, samples, images[2], rotation, pixels, box, bits, counts)
    ends = counts.T.ravel().cumsum().reshape(columns, -1)
    starts = np.ascontiguousarray(ends.T) - counts
    records = np.empty(_RECORD * int(ends[-1, -1]), np.float32)
    places = records.view(np.int32)
    in_threads(_deal, samples, images, rotation, pixels, box, bits, starts, records, places)
    last = np.ascontiguousarray(ends[:, -1])
    for parity in (0, 1):
        in_threads(_sum_columns, samples, parity, last, side, records, places, numerator, denominator)
