"""Triton kernels of the slice operator and of insertion: the semantics of `kernels.reference`, single precision.

A program works on BLOCK pixels of one image. Complex values are tiles [BLOCK, 2], so that real and imaginary part are
read, and added, together. Where neighbours are added to a volume, several samples of one program and of others meet:
that needs atomics. Programs are small and keep everything in registers; nothing is shared between them.
"""

import triton
import triton.language as tl


@triton.jit
def locate(rotation_ptr, kx, ky, scale, box):
    """Where samples fall: x, y, z between neighbours, sign (-1: the Friedel partner was taken), column, rows, planes as
    stored."""
    u, v = scale * kx, scale * ky
    x = tl.load(rotation_ptr) * u + tl.load(rotation_ptr + 1) * v
    y = tl.load(rotation_ptr + 3) * u + tl.load(rotation_ptr + 4) * v
    z = tl.load(rotation_ptr + 6) * u + tl.load(rotation_ptr + 7) * v
    # By the sign's bit: the reference takes the Friedel partner of -0 too.
    sign = tl.where(x.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)
    x, y, z = x * sign, y * sign, z * sign
    half = (box // 2).to(tl.float32)
    # This does nothing for rotations; anything else, NaN too, stays within the array.
    low_x = tl.minimum(tl.maximum(tl.floor(x), 0.0), half - 1)
    low_y = tl.minimum(tl.maximum(tl.floor(y), -half), half - 1)
    low_z = tl.minimum(tl.maximum(tl.floor(z), -half), half - 1)
    column, row, plane = low_x.to(tl.int32), low_y.to(tl.int32), low_z.to(tl.int32)
    row_1, plane_1 = row + 1, plane + 1
    row, row_1 = tl.where(row < 0, row + box, row), tl.where(row_1 < 0, row_1 + box, row_1)
    plane, plane_1 = tl.where(plane < 0, plane + box, plane), tl.where(plane_1 < 0, plane_1 + box, plane_1)
    return x - low_x, y - low_y, z - low_z, sign, column, row, row_1, plane, plane_1


@triton.jit
def _pair_offsets(column, row, plane, box):
    """Where a sample's two numbers lie, [BLOCK, 2]."""
    at = 2 * ((plane * box + row) * (box // 2 + 1) + column)
    return at[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def _line(volume_ptr, column, row, plane, x, box, mask):
    """Interpolated along x, and the step between the two neighbours."""
    at = _pair_offsets(column, row, plane, box)
    left = tl.load(volume_ptr + at, mask=mask, other=0.0)
    step = tl.load(volume_ptr + at + 2, mask=mask, other=0.0) - left
    return left + step * x, step


@triton.jit
def read_with_slopes(volume_ptr, x, y, z, column, row, row_1, plane, plane_1, box, mask):
    """Interpolant and its derivatives along x, y, z, each [BLOCK, 2], in the half that was read."""
    x, y, z, mask = x[:, None], y[:, None], z[:, None], mask[:, None]
    line_0, step_0 = _line(volume_ptr, column, row, plane, x, box, mask)
    line_1, step_1 = _line(volume_ptr, column, row_1, plane, x, box, mask)
    line_2, step_2 = _line(volume_ptr, column, row, plane_1, x, box, mask)
    line_3, step_3 = _line(volume_ptr, column, row_1, plane_1, x, box, mask)
    rise_near, rise_far = line_1 - line_0, line_3 - line_2
    near, far = line_0 + rise_near * y, line_2 + rise_far * y
    step_near, step_far = step_0 + (step_1 - step_0) * y, step_2 + (step_3 - step_2) * y
    slope_x = step_near + (step_far - step_near) * z
    slope_y = rise_near + (rise_far - rise_near) * z
    return near + (far - near) * z, slope_x, slope_y, far - near


@triton.jit
def ramp(shift_ptr, kx, ky, per_px):
    """Cosine and sine of the phase (kx tx + ky ty) per_px, given in turns."""
    turns = (kx * tl.load(shift_ptr) + ky * tl.load(shift_ptr + 1)) * per_px
    # A reduced angle keeps the fast path of the sine accurate.
    angle = (turns - tl.floor(turns + 0.5)) * 6.283185307179586
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def slice_forward(
    volume_ptr, rotation_ptr, shift_ptr, ctf_ptr, kx_ptr, ky_ptr, images_ptr,
    scale, per_px, radius, pixels, box, ctf_stride,
    HAS_SHIFT: tl.constexpr, HAS_CTF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Images [b, pixels, 2]. radius: (d/2 - 1) / scale, beyond which slices are zero. per_px: -1 / N."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pixels
    kx, ky = tl.load(kx_ptr + p, mask=mask, other=0.0), tl.load(ky_ptr + p, mask=mask, other=0.0)
    x, y, z, sign, column, row, row_1, plane, plane_1 = locate(rotation_ptr + image * 9, kx, ky, scale, box)
    value, _, _, _ = read_with_slopes(volume_ptr, x, y, z, column, row, row_1, plane, plane_1, box, mask)
    factor = tl.where(kx * kx + ky * ky <= radius * radius, 1.0, 0.0)
    if HAS_CTF:
        factor *= tl.load(ctf_ptr + image * ctf_stride + p, mask=mask, other=0.0)
    real, imag = tl.split(value)
    real, imag = real * factor, imag * factor * sign
    if HAS_SHIFT:
        cosine, sine = ramp(shift_ptr + image * 2, kx, ky, per_px)
        real, imag = real * cosine - imag * sine, real * sine + imag * cosine
    out = images_ptr + image * pixels * 2 + 2 * p[:, None] + tl.arange(0, 2)[None, :]
    tl.store(out, tl.join(real, imag), mask=mask[:, None])


@triton.jit
def _add_line(grid_ptr, value, column, row, plane, x, box, mask):
    """Add values [BLOCK, 2] to two neighbours along x."""
    at = _pair_offsets(column, row, plane, box)
    right = value * x
    tl.atomic_add(grid_ptr + at, value - right, mask=mask, sem="relaxed")
    tl.atomic_add(grid_ptr + at + 2, right, mask=mask, sem="relaxed")


@triton.jit
def _scatter(grid_ptr, value, x, y, z, column, row, row_1, plane, plane_1, box, mask):
    """Add values [BLOCK, 2] to their eight neighbours."""
    x, y, z, mask = x[:, None], y[:, None], z[:, None], mask[:, None]
    far = value * z
    near = value - far
    near_1, far_1 = near * y, far * y
    _add_line(grid_ptr, near - near_1, column, row, plane, x, box, mask)
    _add_line(grid_ptr, near_1, column, row_1, plane, x, box, mask)
    _add_line(grid_ptr, far - far_1, column, row, plane_1, x, box, mask)
    _add_line(grid_ptr, far_1, column, row_1, plane_1, x, box, mask)


@triton.jit
def slice_backward(
    gradient_ptr, volume_ptr, rotation_ptr, shift_ptr, ctf_ptr, kx_ptr, ky_ptr, grid_ptr, sums_ptr,
    scale, per_px, radius, pixels, box, ctf_stride,
    HAS_SHIFT: tl.constexpr, HAS_CTF: tl.constexpr,
    FOR_VOLUME: tl.constexpr, FOR_POSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the volume's gradient, and store this program's part of the pose's: sums_ptr [b, programs, 8].

    The eight are (xx, xy, yx, yy, zx, zy): sums of the slope along axis i times kx or ky, without `scale`; and the
    shift's two, without -2 pi / N.
    """
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pixels
    kx, ky = tl.load(kx_ptr + p, mask=mask, other=0.0), tl.load(ky_ptr + p, mask=mask, other=0.0)
    x, y, z, sign, column, row, row_1, plane, plane_1 = locate(rotation_ptr + image * 9, kx, ky, scale, box)
    factor = tl.where(kx * kx + ky * ky <= radius * radius, 1.0, 0.0)
    if HAS_CTF:
        factor *= tl.load(ctf_ptr + image * ctf_stride + p, mask=mask, other=0.0)
    arriving = gradient_ptr + image * pixels * 2 + 2 * p[:, None] + tl.arange(0, 2)[None, :]
    real, imag = tl.split(tl.load(arriving, mask=mask[:, None], other=0.0))
    real, imag = real * factor, imag * factor
    if HAS_SHIFT:
        cosine, sine = ramp(shift_ptr + image * 2, kx, ky, per_px)
        real, imag = real * cosine + imag * sine, imag * cosine - real * sine
    # In the half that is read or added to.
    local = tl.join(real, imag * sign)
    if FOR_POSE:
        value, slope_x, slope_y, slope_z = read_with_slopes(
            volume_ptr, x, y, z, column, row, row_1, plane, plane_1, box, mask
        )
        along_x = tl.sum(slope_x * local, 1) * sign
        along_y = tl.sum(slope_y * local, 1) * sign
        along_z = tl.sum(slope_z * local, 1) * sign
        value_real, value_imag = tl.split(value)
        along_k = value_real * imag - value_imag * sign * real
        sums = sums_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * 8
        tl.store(sums, tl.sum(along_x * kx))
        tl.store(sums + 1, tl.sum(along_x * ky))
        tl.store(sums + 2, tl.sum(along_y * kx))
        tl.store(sums + 3, tl.sum(along_y * ky))
        tl.store(sums + 4, tl.sum(along_z * kx))
        tl.store(sums + 5, tl.sum(along_z * ky))
        tl.store(sums + 6, tl.sum(along_k * kx))
        tl.store(sums + 7, tl.sum(along_k * ky))
    if FOR_VOLUME:
        _scatter(grid_ptr, local, x, y, z, column, row, row_1, plane, plane_1, box, mask)


@triton.jit
def insert(
    values_ptr, power_ptr, rotation_ptr, kx_ptr, ky_ptr, numerator_ptr, denominator_ptr,
    scale, radius, pixels, box, BLOCK: tl.constexpr,
):  # fmt: skip
    """Spread complex values [b, pixels, 2] and real weights [b, pixels] over two grids."""
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < pixels
    kx, ky = tl.load(kx_ptr + p, mask=mask, other=0.0), tl.load(ky_ptr + p, mask=mask, other=0.0)
    mask &= kx * kx + ky * ky <= radius * radius
    x, y, z, sign, column, row, row_1, plane, plane_1 = locate(rotation_ptr + image * 9, kx, ky, scale, box)
    given = values_ptr + image * pixels * 2 + 2 * p[:, None] + tl.arange(0, 2)[None, :]
    real, imag = tl.split(tl.load(given, mask=mask[:, None], other=0.0))
    value = tl.join(real, imag * sign)
    _scatter(numerator_ptr, value, x, y, z, column, row, row_1, plane, plane_1, box, mask)
    power = tl.load(power_ptr + image * pixels + p, mask=mask, other=0.0)
    width = box // 2 + 1
    far = power * z
    near = power - far
    _add_weights(denominator_ptr + (plane * box + row) * width + column, near - near * y, x, mask)
    _add_weights(denominator_ptr + (plane * box + row_1) * width + column, near * y, x, mask)
    _add_weights(denominator_ptr + (plane_1 * box + row) * width + column, far - far * y, x, mask)
    _add_weights(denominator_ptr + (plane_1 * box + row_1) * width + column, far * y, x, mask)


@triton.jit
def _add_weights(at, power, x, mask):
    right = power * x
    tl.atomic_add(at, power - right, mask=mask, sem="relaxed")
    tl.atomic_add(at + 1, right, mask=mask, sem="relaxed")
