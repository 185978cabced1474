"""Compiled local refinement of poses: one pass over an image's pixels gives cost, gradient and normal matrix. Single
precision data.

The small turn w of a trial is applied in the image frame, R exp([w]x), so that with k = (kx, ky, 0) a sample moves by
R (w x k). All derivatives of the prediction P = ctf slice are then made of three complex numbers a pixel,

    dP/dw = (ky A, -kx A, T)     A: derivative along R's third column     T: derivative for a turn in the plane
    dP/dt = (kx U, ky U)         U = -2 pi i P / N

and every entry of the 5x5 normal matrix is a sum of one of their products times 1, kx, ky, kx^2, kx ky or ky^2.
The shift ramp is taken off the observation instead of being put on the prediction: the residual has the same length.
"""

import math

import numpy as np

from scalecryo.physics.kernels.jit import Integer, Real, kernel, part
from scalecryo.physics.kernels.refine_step import (
    DAMPING_FALL,
    DAMPING_RISE,
    FIRST_DAMPING,
    LEAST_DAMPING,
    LEAST_SHIFT,
    LEAST_TURN,
    damped_step,
    turn,
)
from scalecryo.physics.kernels.trigonometry import sine_cosine
from scalecryo.physics.kernels.vectors import interpolate_pairs, interpolate_pairs_with_slopes, prefetch

_BLOCK = 256
# Samples ahead whose memory is asked for (measured: 8 and 16 do as well).
_AHEAD = 12
_TWO_PI = 2 * math.pi
# Rows of the scratch array: where a sample falls (fractions between neighbours, sign of the half taken) ...
_X, _Y, _Z, _SIGN = 0, 1, 2, 3
# ... and what is found there (slice, A, T; real, then imaginary).
_P, _A, _T, _ROWS = 4, 6, 8, 10
# Sums over pixels of w times: |e|^2; |A|^2, |U|^2, Re conj(A) U, each with kx^2, kx ky, ky^2; Re conj(A) T and
# Re conj(T) U, each with kx, ky; |T|^2; Re conj(A) e with kx, ky; Re conj(T) e; Re conj(U) e with kx, ky.
_MOMENTS = 20

_Grid = tuple[np.ndarray, int]
"""Transform in bricks (`bricks`), 0 <= x <= half and |y|, |z| <= half; half."""
_Pixels = tuple[np.ndarray, np.ndarray, np.ndarray]
"""kx, ky, weight."""
_Image = tuple[np.ndarray, np.ndarray]
"""ParticleImages pixels, CTF."""
_Work = tuple[np.ndarray, np.ndarray]
"""Scratch rows, and where the lowest of a sample's eight neighbours stands; bits 0 to 2 are its place in its brick."""


def bricks(wrapped: np.ndarray, half: int) -> np.ndarray:
    """The frequencies up to `half` along each axis of a transform (d, d, d//2 + 1), origin in the middle, in bricks of
    2 x 2 x 2, flat as pairs of real numbers; odd sizes are filled up.

    A brick is a cache line: the eight neighbours of a sample lie in 3.4 lines on average, not in 4.5 as along rows, and
    what a sample costs is the lines that it waits for. Copied once: of a large box this is half a gigabyte.
    """
    box, depth, width = wrapped.shape[0], half + 1, (half + 2) // 2
    packed = np.zeros((depth, depth, width, 2, 2, 2), np.complex64)
    for z, y, x in np.ndindex(2, 2, 2):
        columns = wrapped[:, :, x : half + 1 : 2]
        for planes, from_planes in _runs(z, half, box):
            for rows, from_rows in _runs(y, half, box):
                packed[planes, rows, : columns.shape[2], z, y, x] = columns[from_planes, from_rows]
    return packed.view(np.float32).ravel()


def _runs(parity: int, half: int, box: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Bricks along an axis, and where their even or odd values stand in a transform: frequencies from 0, then below."""
    below = (half - parity + 1) // 2
    first = parity + 2 * below - half
    count = len(range(first, half + 1, 2))
    return (slice(below, below + count), slice(first, half + 1, 2)), (slice(below), slice(box - half + parity, box, 2))


@part
def _bricks_along(half: int) -> tuple[int, int]:
    """Numbers of bricks along x and along y."""
    return (half + 2) // 2, half + 1


@part
def _steps(at: Integer, half: int) -> tuple[Integer, Integer, Integer]:
    """From a value to its neighbours along x, y and z, in values: within the brick, or into the next."""
    wide, high = _bricks_along(half)
    row, plane = 8 * wide, 8 * wide * high
    return 1 + 6 * (at & 1), 2 + (row - 4) * ((at >> 1) & 1), 4 + (plane - 8) * ((at >> 2) & 1)


@part
def _cut(pixels: _Pixels, image: _Image, start: int, inside: int) -> tuple[_Pixels, _Image]:
    """A block of pixels, counted from 0: numba makes gathers of kx[start + i]."""
    (kx, ky, weight), (observed, ctf), stop = pixels, image, min(start + _BLOCK, inside)
    return (kx[start:stop], ky[start:stop], weight[start:stop]), (observed[start:stop], ctf[start:stop])


@part
def _locate(half: int, rotation: np.ndarray, pixels: _Pixels, work: _Work) -> None:
    (kx, ky, _), (scratch, corner) = pixels, work
    top, zero, one = np.float32(half), np.float32(0), np.float32(1)
    wide, high = _bricks_along(half)
    xx, xy, yx, yy = rotation[0, 0], rotation[0, 1], rotation[1, 0], rotation[1, 1]
    zx, zy = rotation[2, 0], rotation[2, 1]
    for i in range(kx.shape[0]):
        u, v = kx[i], ky[i]
        x, y, z = xx * u + xy * v, yx * u + yy * v, zx * u + zy * v
        sign = np.copysign(one, x)
        x, y, z = x * sign, y * sign, z * sign
        # No effect on rotations: they keep everything else within the array.
        low_x = min(max(np.floor(x), zero), top - one)
        low_y = min(max(np.floor(y), -top), top - one)
        low_z = min(max(np.floor(z), -top), top - one)
        scratch[_X, i], scratch[_Y, i], scratch[_Z, i], scratch[_SIGN, i] = x - low_x, y - low_y, z - low_z, sign
        column, row, plane = np.int32(low_x), np.int32(low_y + top), np.int32(low_z + top)
        brick = ((plane >> 1) * np.int32(high) + (row >> 1)) * np.int32(wide) + (column >> 1)
        corner[i] = brick * 8 + (plane & 1) * 4 + (row & 1) * 2 + (column & 1)


@part
def _fetch_ahead(grid: _Grid, corner: np.ndarray, i: int, count: int) -> None:
    """Ask for the bricks of a later sample: at high resolution the map is far larger than the caches."""
    volume, half = grid
    at = np.intp(corner[min(i + _AHEAD, count - 1)])
    side, row, plane = _steps(at, half)
    prefetch(volume, 2 * at)
    prefetch(volume, 2 * (at + row))
    prefetch(volume, 2 * (at + plane))
    prefetch(volume, 2 * (at + plane + row + side))


@part
def _read_values(grid: _Grid, count: int, work: _Work) -> None:
    (volume, half), (scratch, corner) = grid, work
    for i in range(count):
        _fetch_ahead(grid, corner, i, count)
        at = np.intp(corner[i])
        side, row, plane = _steps(at, half)
        x, y, z = scratch[_X, i], scratch[_Y, i], scratch[_Z, i]
        real, imag = interpolate_pairs(volume, 2 * at, 2 * side, 2 * row, 2 * plane, x, y, z)
        scratch[_P, i], scratch[_P + 1, i] = real, scratch[_SIGN, i] * imag


@part
def _read_derivatives(grid: _Grid, rotation: np.ndarray, pixels: _Pixels, work: _Work) -> None:
    """Slice, A and T. For a Friedel partner -q the chain rule brings one minus sign, the conjugate another."""
    (volume, half), (kx, ky, _), (scratch, corner) = grid, pixels, work
    count = kx.shape[0]
    nx, ny, nz = rotation[0, 2], rotation[1, 2], rotation[2, 2]
    for i in range(count):
        _fetch_ahead(grid, corner, i, count)
        at = np.intp(corner[i])
        side, row, plane = _steps(at, half)
        x, y, z, sign = scratch[_X, i], scratch[_Y, i], scratch[_Z, i], scratch[_SIGN, i]
        u, v = kx[i], ky[i]
        tx = u * rotation[0, 1] - v * rotation[0, 0]
        ty = u * rotation[1, 1] - v * rotation[1, 0]
        tz = u * rotation[2, 1] - v * rotation[2, 0]
        found = interpolate_pairs_with_slopes(volume, 2 * at, 2 * side, 2 * row, 2 * plane, x, y, z)
        scratch[_P, i], scratch[_P + 1, i] = found[0], sign * found[1]
        scratch[_A, i] = sign * (found[2] * nx + found[4] * ny + found[6] * nz)
        scratch[_T, i] = sign * (found[2] * tx + found[4] * ty + found[6] * tz)
        scratch[_A + 1, i] = found[3] * nx + found[5] * ny + found[7] * nz
        scratch[_T + 1, i] = found[3] * tx + found[5] * ty + found[7] * tz


@part
def _sum_cost(image: _Image, pixels: _Pixels, ramp: tuple[Real, Real], scratch: np.ndarray) -> Real:
    """Sum of w |e|^2 over a block. ramp: shift / N."""
    (observed, ctf), (kx, ky, weight) = image, pixels
    total = np.float32(0)
    for i in range(kx.shape[0]):
        sine, cosine = sine_cosine(kx[i] * ramp[0] + ky[i] * ramp[1])
        real = observed[i].real * cosine - observed[i].imag * sine - ctf[i] * scratch[_P, i]
        imag = observed[i].real * sine + observed[i].imag * cosine - ctf[i] * scratch[_P + 1, i]
        total += weight[i] * (real * real + imag * imag)
    return total


@part
def _sum_moments(
    image: _Image,
    pixels: _Pixels,
    ramp: tuple[Real, Real],
    step: Real,
    scratch: np.ndarray,
    moments: np.ndarray,
) -> None:
    """Add a block's sums (single precision) to the moments (double). ramp: shift / N. step: 2 pi / N."""
    (observed, ctf), (kx, ky, weight) = image, pixels
    zero = np.float32(0)
    ee = aaxx = aaxy = aayy = uuxx = uuxy = uuyy = auxx = auxy = auyy = zero
    atx = aty = tux = tuy = tt = aex = aey = te = uex = uey = zero
    for i in range(kx.shape[0]):
        x, y, w, c = kx[i], ky[i], weight[i], ctf[i]
        sine, cosine = sine_cosine(x * ramp[0] + y * ramp[1])
        real, imag = c * scratch[_P, i], c * scratch[_P + 1, i]
        e_real = observed[i].real * cosine - observed[i].imag * sine - real
        e_imag = observed[i].real * sine + observed[i].imag * cosine - imag
        a_real, a_imag = c * scratch[_A, i], c * scratch[_A + 1, i]
        t_real, t_imag = c * scratch[_T, i], c * scratch[_T + 1, i]
        u_real, u_imag = step * imag, -step * real
        wx, wy = w * x, w * y
        wxx, wxy, wyy = wx * x, wx * y, wy * y
        aa, uu = a_real * a_real + a_imag * a_imag, u_real * u_real + u_imag * u_imag
        au, at = a_real * u_real + a_imag * u_imag, a_real * t_real + a_imag * t_imag
        tu, ae = t_real * u_real + t_imag * u_imag, a_real * e_real + a_imag * e_imag
        ue = u_real * e_real + u_imag * e_imag
        ee += w * (e_real * e_real + e_imag * e_imag)
        aaxx, aaxy, aayy = aaxx + wxx * aa, aaxy + wxy * aa, aayy + wyy * aa
        uuxx, uuxy, uuyy = uuxx + wxx * uu, uuxy + wxy * uu, uuyy + wyy * uu
        auxx, auxy, auyy = auxx + wxx * au, auxy + wxy * au, auyy + wyy * au
        atx, aty, tux, tuy = atx + wx * at, aty + wy * at, tux + wx * tu, tuy + wy * tu
        tt += w * (t_real * t_real + t_imag * t_imag)
        aex, aey, te = aex + wx * ae, aey + wy * ae, te + w * (t_real * e_real + t_imag * e_imag)
        uex, uey = uex + wx * ue, uey + wy * ue
    sums = (ee, aaxx, aaxy, aayy, uuxx, uuxy, uuyy, auxx, auxy, auyy, atx, aty, tux, tuy, tt, aex, aey, te, uex, uey)
    for m in range(_MOMENTS):
        moments[m] += sums[m]


@part
def _image_cost(
    grid: _Grid,
    pixels: _Pixels,
    image: _Image,
    inside: int,
    rotation: np.ndarray,
    ramp: tuple[Real, Real],
    work: _Work,
) -> Real:
    """Sum of w |e|^2 / 2 over the first `inside` pixels. rotation: times scale."""
    total: Real = 0.0
    for start in range(0, inside, _BLOCK):
        here, seen = _cut(pixels, image, start, inside)
        _locate(grid[1], rotation, here, work)
        _read_values(grid, here[0].shape[0], work)
        total += _sum_cost(seen, here, ramp, work[0])
    return total / 2


@part
def _image_moments(
    grid: _Grid,
    pixels: _Pixels,
    image: _Image,
    inside: int,
    rotation: np.ndarray,
    ramp: tuple[Real, Real],
    work: _Work,
    step: Real,
    moments: np.ndarray,
) -> Real:
    """Fill the moments; returns what `_image_cost` does."""
    moments[:] = 0
    for start in range(0, inside, _BLOCK):
        here, seen = _cut(pixels, image, start, inside)
        _locate(grid[1], rotation, here, work)
        _read_derivatives(grid, rotation, here, work)
        _sum_moments(seen, here, ramp, step, work[0], moments)
    cost: Real = moments[0] / 2
    return cost


@part
def _cost_beyond(image: _Image, weight: np.ndarray, inside: int) -> Real:
    """Cost of the pixels outside the volume's transform, where the slice is zero at every pose."""
    total = 0.0
    for p in range(inside, weight.shape[0]):
        total += weight[p] * (image[0][p].real * image[0][p].real + image[0][p].imag * image[0][p].imag)
    return total / 2


@part
def _normal_equations(m: np.ndarray, matrix: np.ndarray, gradient: np.ndarray) -> None:
    """The Gauss-Newton matrix (lower half) and minus the gradient of the cost, in the order wx, wy, wz, tx, ty."""
    matrix[0, 0], matrix[1, 0], matrix[1, 1] = m[3], -m[2], m[1]
    matrix[2, 0], matrix[2, 1], matrix[2, 2] = m[11], -m[10], m[14]
    matrix[3, 0], matrix[3, 1], matrix[3, 2], matrix[3, 3] = m[8], -m[7], m[12], m[4]
    matrix[4, 0], matrix[4, 1], matrix[4, 2], matrix[4, 3], matrix[4, 4] = m[9], -m[8], m[13], m[5], m[6]
    gradient[0], gradient[1], gradient[2], gradient[3], gradient[4] = m[16], -m[15], m[17], m[18], m[19]


@part
def _copy(source: np.ndarray, factor: Real, target: np.ndarray) -> None:
    for i in range(3):
        for j in range(3):
            target[i, j] = source[i, j] * factor


@part
def _refine_image(
    grid: _Grid,
    pixels: _Pixels,
    image: _Image,
    inside: int,
    geometry: tuple[Real, Real],
    limits: tuple[int, int, Real, Real],
    work: _Work,
    memory: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    rotation: np.ndarray,
    shift: np.ndarray,
) -> tuple[Real, Real]:
    """Refine one image in place; returns its cost before and after, without `_cost_beyond`."""
    (scale, turns), (passes, free, most_turn, most_shift) = geometry, limits
    moments, matrix, gradient, solved, exact, trial, turned = memory
    step, circle, damping = solved[5], np.float32(_TWO_PI) * turns, FIRST_DAMPING
    before: Real = math.inf
    cost: Real = math.inf
    x, y = shift[0], shift[1]
    _copy(rotation, 1.0, trial)
    for number in range(passes + 1):
        _copy(trial, scale, turned)
        ramp = x * turns, y * turns
        if number == passes:
            now = _image_cost(grid, pixels, image, inside, turned, ramp, work)
        else:
            now = _image_moments(grid, pixels, image, inside, turned, ramp, work, circle, moments)
        if number == 0:
            before = now
        if number == 0 or now < cost:
            cost = now
            damping = max(damping * DAMPING_FALL, LEAST_DAMPING) if number else damping
            _copy(trial, 1.0, rotation)
            if free == 5:
                shift[0], shift[1] = x, y
            _normal_equations(moments, matrix, gradient)
        else:
            damping *= DAMPING_RISE
        damped_step(matrix, gradient, damping, free, solved)
        size, length = turn(rotation, step, most_turn, exact), math.hypot(step[3], step[4])
        # Without a finite step there is nothing to gain, and positions must stay numbers.
        usable = math.isfinite(cost) and math.isfinite(size) and math.isfinite(length)
        if not usable or (size < LEAST_TURN and length < LEAST_SHIFT):
            break
        cut = min(1.0, most_shift / max(length, 1e-30))
        x, y = np.float32(shift[0] + cut * step[3]), np.float32(shift[1] + cut * step[4])
        _copy(exact, 1.0, trial)  # rounded here, so that the cost is that of the pose returned
    return before, cost


@kernel
def refine_images(
    share: int,
    shares: int,
    grid: _Grid,
    pixels: _Pixels,
    observed: np.ndarray,
    ctf: np.ndarray,
    inside: int,
    geometry: tuple[Real, Real],
    limits: tuple[int, int, Real, Real],
    rotation: np.ndarray,
    shift: np.ndarray,
    cost: np.ndarray,
) -> None:
    """Refine every `shares`-th image in place; cost (b, 2) becomes the costs before and after.

    ctf has b rows, or one for all. inside: number of pixels within the transform. geometry: padded_box / box_size,
    1 / box_size. limits: passes, parameters (3: no shift, 5), largest turn (rad) and shift (px) of a pass.
    """
    work = np.empty((_ROWS, _BLOCK), np.float32), np.empty(_BLOCK, np.int32)
    algebra = np.zeros(_MOMENTS), np.zeros((5, 5)), np.empty(5), np.empty((7, 5))
    memory = *algebra, np.empty((3, 3)), np.empty((3, 3), np.float32), np.empty((3, 3), np.float32)
    for b in range(share, rotation.shape[0], shares):
        image = observed[b], ctf[min(b, ctf.shape[0] - 1)]
        costs = _refine_image(grid, pixels, image, inside, geometry, limits, work, memory, rotation[b], shift[b])
        beyond = _cost_beyond(image, pixels[2], inside)
        cost[b, 0], cost[b, 1] = costs[0] + beyond, costs[1] + beyond


@kernel
def score_poses(
    share: int,
    shares: int,
    grid: _Grid,
    pixels: _Pixels,
    observed: np.ndarray,
    ctf: np.ndarray,
    inside: int,
    geometry: tuple[Real, Real],
    rotation: np.ndarray,
    shift: np.ndarray,
    cost: np.ndarray,
) -> None:
    """Fill cost (b, k) for rotation (b, k, 3, 3) and shift (b, k, 2), the rest as for `refine_images`."""
    work, turned = (np.empty((_ROWS, _BLOCK), np.float32), np.empty(_BLOCK, np.int32)), np.empty((3, 3), np.float32)
    scale, turns = geometry
    for b in range(share, rotation.shape[0], shares):
        image = observed[b], ctf[min(b, ctf.shape[0] - 1)]
        beyond = _cost_beyond(image, pixels[2], inside)
        for k in range(rotation.shape[1]):
            _copy(rotation[b, k], scale, turned)
            ramp = shift[b, k, 0] * turns, shift[b, k, 1] * turns
            cost[b, k] = _image_cost(grid, pixels, image, inside, turned, ramp, work) + beyond
