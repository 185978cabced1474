"""Triton kernel of the local refinement of poses: residual, gradient and normal matrix of every image in one pass over
its pixels."""

import triton
import triton.language as tl

from scalecryo.physics.kernels.triton_slice import locate, ramp, read_with_slopes


@triton.jit
def centred(image_ptr, shift, kx, ky, per_px, p, mask):
    """An image's pixels without its shift."""
    pairs = image_ptr + 2 * p[:, None] + tl.arange(0, 2)[None, :]
    real, imag = tl.split(tl.load(pairs, mask=mask[:, None], other=0.0))
    cosine, sine = ramp(shift, kx, ky, per_px)
    return real * cosine - imag * sine, real * sine + imag * cosine


@triton.jit
def along_turns(pose, slope_x, slope_y, slope_z, kx, ky, factor, sign):
    """A and T (real and imaginary parts) from the transform's slopes; factor: CTF times the samples per cycle and box.

    For a Friedel partner -q the chain rule brings one minus sign, the conjugate another.
    """
    xx, xy, nx = tl.load(pose), tl.load(pose + 1), tl.load(pose + 2)
    yx, yy, ny = tl.load(pose + 3), tl.load(pose + 4), tl.load(pose + 5)
    zx, zy, nz = tl.load(pose + 6), tl.load(pose + 7), tl.load(pose + 8)
    tx, ty, tz = kx * xy - ky * xx, kx * yy - ky * yx, kx * zy - ky * zx
    a_real, a_imag = tl.split(slope_x * nx + slope_y * ny + slope_z * nz)
    t_real, t_imag = tl.split(slope_x * tx[:, None] + slope_y * ty[:, None] + slope_z * tz[:, None])
    return a_real * factor * sign, a_imag * factor, t_real * factor * sign, t_imag * factor


@triton.jit
def store_moments(
    sums, ee, aaxx, aaxy, aayy, uuxx, uuxy, uuyy, auxx, auxy, auyy, atx, aty, tux, tuy, tt, aex, aey, te, uex, uey
):
    """Add each up over the block, and store them in the order of `kernels.refine_cpu`."""
    tl.store(sums, tl.sum(ee))
    tl.store(sums + 1, tl.sum(aaxx))
    tl.store(sums + 2, tl.sum(aaxy))
    tl.store(sums + 3, tl.sum(aayy))
    tl.store(sums + 4, tl.sum(uuxx))
    tl.store(sums + 5, tl.sum(uuxy))
    tl.store(sums + 6, tl.sum(uuyy))
    tl.store(sums + 7, tl.sum(auxx))
    tl.store(sums + 8, tl.sum(auxy))
    tl.store(sums + 9, tl.sum(auyy))
    tl.store(sums + 10, tl.sum(atx))
    tl.store(sums + 11, tl.sum(aty))
    tl.store(sums + 12, tl.sum(tux))
    tl.store(sums + 13, tl.sum(tuy))
    tl.store(sums + 14, tl.sum(tt))
    tl.store(sums + 15, tl.sum(aex))
    tl.store(sums + 16, tl.sum(aey))
    tl.store(sums + 17, tl.sum(te))
    tl.store(sums + 18, tl.sum(uex))
    tl.store(sums + 19, tl.sum(uey))


@triton.jit
def refinement_sums(
    volume_ptr, observed_ptr, rotation_ptr, shift_ptr, ctf_ptr, kx_ptr, ky_ptr, weight_ptr, sums_ptr,
    scale, per_px, pixels, box, ctf_stride, observed_stride,
    HAS_CTF: tl.constexpr, DERIVATIVES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Store this program's part of an image's sums: sums_ptr [b, programs, 20], or [b, programs, 1] of |e|^2 alone.

    A, T, U, e and the order of the sums as in `kernels.refine_cpu`. per_px: 1 / N. The normal matrix of an image never
    leaves the registers before it is complete.
    """
    image = tl.program_id(1).to(tl.int64)
    pose, shift = rotation_ptr + image * 9, shift_ptr + image * 2
    zero = tl.zeros([BLOCK], tl.float32)
    ee = zero
    if DERIVATIVES:
        aaxx, aaxy, aayy, uuxx, uuxy, uuyy, auxx, auxy, auyy = zero, zero, zero, zero, zero, zero, zero, zero, zero
        atx, aty, tux, tuy, tt, aex, aey, te, uex, uey = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    first = tl.program_id(0) * BLOCKS * BLOCK
    for start in range(first, tl.minimum(first + BLOCKS * BLOCK, pixels), BLOCK):
        p = start + tl.arange(0, BLOCK)
        mask = p < pixels
        kx, ky = tl.load(kx_ptr + p, mask=mask, other=0.0), tl.load(ky_ptr + p, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + p, mask=mask, other=0.0)
        x, y, z, sign, column, row, row_1, plane, plane_1 = locate(pose, kx, ky, scale, box)
        value, slope_x, slope_y, slope_z = read_with_slopes(
            volume_ptr, x, y, z, column, row, row_1, plane, plane_1, box, mask
        )
        contrast = zero + 1.0
        if HAS_CTF:
            contrast = tl.load(ctf_ptr + image * ctf_stride + p, mask=mask, other=0.0)
        p_real, p_imag = tl.split(value)
        p_real, p_imag = contrast * p_real, contrast * sign * p_imag
        given = observed_ptr + image * observed_stride * 2
        o_real, o_imag = centred(given, shift, kx, ky, per_px, p, mask)
        e_real, e_imag = o_real - p_real, o_imag - p_imag
        ee += weight * (e_real * e_real + e_imag * e_imag)
        if DERIVATIVES:
            a_real, a_imag, t_real, t_imag = along_turns(
                pose, slope_x, slope_y, slope_z, kx, ky, contrast * scale, sign
            )
            step = 6.283185307179586 * per_px
            u_real, u_imag = step * p_imag, -step * p_real
            wx, wy = weight * kx, weight * ky
            wxx, wxy, wyy = wx * kx, wx * ky, wy * ky
            aa, uu = a_real * a_real + a_imag * a_imag, u_real * u_real + u_imag * u_imag
            au, at = a_real * u_real + a_imag * u_imag, a_real * t_real + a_imag * t_imag
            tu, ae = t_real * u_real + t_imag * u_imag, a_real * e_real + a_imag * e_imag
            ue = u_real * e_real + u_imag * e_imag
            aaxx, aaxy, aayy = aaxx + wxx * aa, aaxy + wxy * aa, aayy + wyy * aa
            uuxx, uuxy, uuyy = uuxx + wxx * uu, uuxy + wxy * uu, uuyy + wyy * uu
            auxx, auxy, auyy = auxx + wxx * au, auxy + wxy * au, auyy + wyy * au
            atx, aty, tux, tuy = atx + wx * at, aty + wy * at, tux + wx * tu, tuy + wy * tu
            tt += weight * (t_real * t_real + t_imag * t_imag)
            aex, aey, te = aex + wx * ae, aey + wy * ae, te + weight * (t_real * e_real + t_imag * e_imag)
            uex, uey = uex + wx * ue, uey + wy * ue
    if DERIVATIVES:
        store_moments(
            sums_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * 20,
            ee, aaxx, aaxy, aayy, uuxx, uuxy, uuyy, auxx, auxy, auyy, atx, aty, tux, tuy, tt, aex, aey, te, uex, uey,
        )  # fmt: skip
    else:
        tl.store(sums_ptr + image * tl.num_programs(0) + tl.program_id(0), tl.sum(ee))
