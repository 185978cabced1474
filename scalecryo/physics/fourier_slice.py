"""Central slices of a volume's transform, and the adjoint that puts slices back.

The volume's transform is half-complex in torch.fft order on a box d = padded_box, oversampled by scale = d / box_size
against the images. Sample (b, p) sits at q = scale R_b (kx, ky, 0), R as in `rotation.py`. Where q_x < 0 the point -q
is taken instead and the value conjugated, so the eight neighbours always lie in the stored half kx >= 0.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalecryo.physics.fft import check_even_box


def padded_box(box_size: int, padding: float) -> int:
    """Even box nearest to padding * box_size, never smaller than box_size."""
    check_even_box(box_size)
    return max(box_size, 2 * round(padding * box_size / 2))


def gridding_correction(
    box_size: int,
    padding: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n n n"]:
    """What a centred map is multiplied by, before padding and transform, to undo trilinear interpolation.

    Interpolating a transform with a triangle of width 2/d multiplies the map by sinc^2(x/d) along each axis
    (x in px from the centre, d the padded box); this is the inverse.
    """
    axis = torch.arange(box_size, device=device, dtype=torch.float64) - box_size // 2
    line = torch.sinc(axis / padded_box(box_size, padding)).square().reciprocal()
    return (line[:, None, None] * line[None, :, None] * line[None, None, :]).to(dtype)


class _Samples(NamedTuple):
    """Where b*p samples fall in a half-complex volume."""

    rows: tuple[Int[Tensor, "b*p"], ...]
    """Flat index of the lower x neighbour, at (z, y), (z, y+1), (z+1, y), (z+1, y+1)."""
    fraction: tuple[Float[Tensor, "b p"], ...]
    """Position between neighbours along x, y, z."""
    sign: Float[Tensor, "b p"]
    """-1 where the mate -q was taken, else 1."""
    inside: Float[Tensor, "p"]
    """1 where scale |k| <= d/2 - 1, else 0."""


def _wrap(position: Float[Tensor, "b p"], box: int) -> Float[Tensor, "b p"]:
    """Add the box to negative whole numbers: for them the clamp is 1, for others 0 (torch.where is 5 times slower)."""
    return position.add((-position).clamp_(0, 1), alpha=box)


def _locate(
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
    box: int,
) -> _Samples:
    half, width = box // 2, box // 2 + 1
    kx, ky = scale * kx, scale * ky
    # Not a matrix product: TF32 would cost whole voxels.
    x, y, z = (torch.addcmul(rotation[:, i, :1] * kx, rotation[:, i, 1:2], ky) for i in range(3))
    sign = torch.ones_like(x).copysign(x)
    x, y, z = x * sign, y * sign, z * sign
    # This does nothing for a rotation and a radius inside d/2 - 1; any other input stays within the array (NaN: NaN).
    low_x = x.floor().nan_to_num_().clamp_(0, half - 1)
    low_y, low_z = (axis.floor().nan_to_num_().clamp_(-half, half - 1) for axis in (y, z))
    column = low_x.long().flatten()
    line_y, line_z = ((_wrap(low, box), _wrap(low + 1, box)) for low in (low_y, low_z))
    # z * d + y is exact in single precision up to d = 4096.
    rows = tuple(torch.add(column, (box * a + b).long().flatten(), alpha=width) for a in line_z for b in line_y)
    inside = (torch.hypot(kx, ky) <= (half - 1) * (1 + 1e-6)).to(x.dtype)
    return _Samples(rows, (x - low_x, y - low_y, z - low_z), sign, inside)


def _conjugate(values: Complex[Tensor, "b p"], sign: Float[Tensor, "b p"]) -> Complex[Tensor, "b p"]:
    """Conjugate where sign is -1."""
    return torch.complex(values.real, values.imag * sign)


def _scatter(values: Shaped[Tensor, "b p"], samples: _Samples, grid: Shaped[Tensor, "d d h"]) -> None:
    """Add values, spread over their eight neighbours, to grid in place: the adjoint of interpolation."""
    flat = grid.view(-1)
    # Complex fractions: a product with a real tensor would convert it every time.
    x, y, z = (fraction.to(values.dtype) for fraction in samples.fraction)
    values = values * samples.inside
    if values.is_complex():
        values = _conjugate(values, samples.sign)
    far = values * z
    for plane, rows in ((values - far, samples.rows[:2]), (far, samples.rows[2:])):
        outer = plane * y
        for line, row in zip((plane - outer, outer), rows, strict=True):
            right = line * x
            # One-dimensional scatter_add is the one accumulation that torch does at memory speed (index_add_: half).
            flat.scatter_add_(0, row, (line - right).flatten())
            flat.scatter_add_(0, row + 1, right.flatten())


class _ExtractSlices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, volume: Tensor, rotation: Tensor, kx: Tensor, ky: Tensor, scale: float
    ) -> Complex[Tensor, "b p"]:
        samples = _locate(rotation, kx, ky, scale, volume.shape[0])
        flat, shape = volume.reshape(-1), samples.sign.shape
        x, y, z = (fraction.to(flat.dtype) for fraction in samples.fraction)
        left = [flat.index_select(0, row).view(shape) for row in samples.rows]
        step = [flat.index_select(0, row + 1).view(shape) - a for row, a in zip(samples.rows, left, strict=True)]
        line = [torch.addcmul(a, s, x) for a, s in zip(left, step, strict=True)]
        rise_near, rise_far = line[1] - line[0], line[3] - line[2]
        near, far = torch.addcmul(line[0], rise_near, y), torch.addcmul(line[2], rise_far, y)
        slope_z = far - near
        slopes: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            step_near = torch.addcmul(step[0], step[1] - step[0], y)
            step_far = torch.addcmul(step[2], step[3] - step[2], y)
            slope_x = torch.addcmul(step_near, step_far - step_near, z)
            slope_y = torch.addcmul(rise_near, rise_far - rise_near, z)
            slopes = (slope_x, slope_y, slope_z)
        ctx.scale, ctx.shape = scale, volume.shape
        ctx.save_for_backward(rotation, kx, ky, *slopes)
        return _conjugate(torch.addcmul(near, slope_z, z), samples.sign) * samples.inside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rotation, kx, ky, *slopes = ctx.saved_tensors
        samples = _locate(rotation, kx, ky, ctx.scale, ctx.shape[0])
        for_volume = for_rotation = None
        if ctx.needs_input_grad[0]:
            for_volume = gradient.new_zeros(ctx.shape)
            _scatter(gradient, samples, for_volume)
        if ctx.needs_input_grad[1]:
            local = _conjugate(gradient, samples.sign) * (samples.inside * samples.sign)
            along = torch.stack([local.real * s.real + local.imag * s.imag for s in slopes], dim=1)
            first_two = ctx.scale * torch.stack([(along * kx).sum(-1), (along * ky).sum(-1)], dim=-1)
            for_rotation = torch.nn.functional.pad(first_two, (0, 1))
        return for_volume, for_rotation, None, None, None


def extract_slices(
    volume_rfft: Complex[Tensor, "d d h"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
) -> Complex[Tensor, "b p"]:
    """Central slices of a volume's transform at packed Fourier pixels.

    Slice b holds F_vol(scale R_b (kx, ky, 0)): the transform of the projection along z of the volume turned by R_b^T
    (Fourier slice theorem, Bracewell 1956), with no factor. Trilinear; zero where scale |k| > d/2 - 1.

    Differentiable in volume and rotation (R's third column gets zero; gradients are one-sided where a sample falls
    exactly on a grid plane, as for any trilinear interpolation). Single and double precision.

    Args:
        volume_rfft: `rfft3_centred` of the (gridding corrected) volume, box d.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.
    """
    return _ExtractSlices.apply(volume_rfft, rotation, kx, ky, scale)


@torch.no_grad()
def insert_slices(
    values: Shaped[Tensor, "b p"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    scale: float,
    padded_box: int,
    out: Shaped[Tensor, "d d h"] | None = None,
) -> Shaped[Tensor, "d d h"]:
    """Spread slices over the half-complex grid of box d = padded_box: the adjoint of `extract_slices`.

    Re<extract_slices(V), S> = Re<V, insert_slices(S)>, both sums over the *stored* entries, each once: every sample
    lands once, at q or at its mate -q (conjugated), whichever has q_x >= 0. Real values (weights) are spread the same
    way onto a real grid, without conjugation.

    For the sum over all samples and all their mates, as a reconstruction needs, insert values * weight / 2, with
    `FourierPixels.weight` (the kx = 0 column of a half disc already holds its own mates), and call `add_plane_mates`
    once at the end.

    Not differentiable.

    Args:
        values: packed slices, or real weights.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.
        padded_box: box d of the grid.
        out: contiguous grid to add to, in place, and return; default a new grid of zeros.
    """
    check_even_box(padded_box)
    if out is None:
        out = values.new_zeros(padded_box, padded_box, padded_box // 2 + 1)
    _scatter(values, _locate(rotation, kx, ky, scale, padded_box), out)
    return out


def add_plane_mates(grid: Shaped[Tensor, "d d h"]) -> Shaped[Tensor, "d d h"]:
    """Add to every entry of the kx = 0 plane the conjugate of its mate at (-kz, -ky), in place.

    That plane is the only one whose mates are stored too, and where inserted samples within one voxel of it must
    appear twice. Afterwards the grid is the half of a Hermitian one.
    """
    plane = grid[:, :, 0]
    mate = plane.flip(0, 1).roll((1, 1), (0, 1))
    grid[:, :, 0] = plane + mate.conj()
    return grid
