"""The slice operator in plain torch: what the compiled backends are compared with. Any device, single and double.

Sample (b, p) sits at q = scale R_b (kx, ky, 0). Where q_x < 0 the point -q is taken instead and the value conjugated,
so the eight neighbours always lie in the stored half kx >= 0.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor

from scalecryo.physics.image_formation import form_images, shift_ramp
from scalecryo.physics.kernels.views import Gradients, Views, Wanted


class Samples(NamedTuple):
    """Where b*p samples fall in a half-complex volume."""

    rows: tuple[Int[Tensor, " b*p"], ...]
    """Flat index of the lower x neighbour, at (z, y), (z, y+1), (z+1, y), (z+1, y+1)."""
    fraction: tuple[Float[Tensor, "b p"], ...]
    """Position between neighbours along x, y, z."""
    sign: Float[Tensor, "b p"]
    """-1 where the Friedel partner -q was taken, else 1."""
    inside: Float[Tensor, " p"]
    """1 where scale |k| <= d/2 - 1, else 0."""


def _wrap(position: Float[Tensor, "b p"], box: int) -> Float[Tensor, "b p"]:
    """Add the box to negative whole numbers: for them the clamp is 1, for others 0 (torch.where is 5 times slower)."""
    return position.add((-position).clamp_(0, 1), alpha=box)


def locate(
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    box: int,
) -> Samples:
    """Where the samples of slices fall in a transform of box d = `box`."""
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
    return Samples(rows, (x - low_x, y - low_y, z - low_z), sign, inside)


def _conjugate(values: Complex[Tensor, "b p"], sign: Float[Tensor, "b p"]) -> Complex[Tensor, "b p"]:
    """Conjugate where sign is -1."""
    return torch.complex(values.real, values.imag * sign)


def scatter(values: Shaped[Tensor, "b p"], samples: Samples, grid: Shaped[Tensor, "d d h"]) -> None:
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


def _interpolate(
    volume: Complex[Tensor, "d d h"], samples: Samples, *, slopes: bool
) -> tuple[Complex[Tensor, "b p"], tuple[Complex[Tensor, "b p"], ...]]:
    """Slices, and the interpolant's derivatives along x, y, z in the half that was read (or none)."""
    flat, shape = volume.reshape(-1), samples.sign.shape
    x, y, z = (fraction.to(flat.dtype) for fraction in samples.fraction)
    left = [flat.index_select(0, row).view(shape) for row in samples.rows]
    step = [flat.index_select(0, row + 1).view(shape) - a for row, a in zip(samples.rows, left, strict=True)]
    line = [torch.addcmul(a, s, x) for a, s in zip(left, step, strict=True)]
    rise_near, rise_far = line[1] - line[0], line[3] - line[2]
    near, far = torch.addcmul(line[0], rise_near, y), torch.addcmul(line[2], rise_far, y)
    slope_z = far - near
    values = _conjugate(torch.addcmul(near, slope_z, z), samples.sign) * samples.inside
    if not slopes:
        return values, ()
    step_near = torch.addcmul(step[0], step[1] - step[0], y)
    step_far = torch.addcmul(step[2], step[3] - step[2], y)
    slope_x = torch.addcmul(step_near, step_far - step_near, z)
    slope_y = torch.addcmul(rise_near, rise_far - rise_near, z)
    return values, (slope_x, slope_y, slope_z)


def forward(volume: Complex[Tensor, "d d h"], views: Views) -> Complex[Tensor, "b p"]:
    """Images: slice, times CTF, shifted."""
    rotation, shift_px, ctf, kx, ky, scale, box_size = views
    slices, _ = _interpolate(volume, locate(rotation, kx, ky, scale, volume.shape[0]), slopes=False)
    return form_images(slices, ctf, shift_px, kx, ky, box_size)


def backward(
    gradient: Complex[Tensor, "b p"], volume: Complex[Tensor, "d d h"], views: Views, wanted: Wanted
) -> Gradients:
    """Gradients of a real function of the images, whose gradient by them is given."""
    rotation, shift_px, ctf, kx, ky, scale, box_size = views
    samples = locate(rotation, kx, ky, scale, volume.shape[0])
    for_volume, for_rotation, for_shift = volume.new_empty(0), rotation.new_empty(0), rotation.new_empty(0)
    # The gradient by the slice itself: a product's is the other factor's conjugate times what arrives.
    local = gradient if shift_px is None else gradient * shift_ramp(-shift_px, kx, ky, box_size)
    local = local if ctf is None else local * ctf
    if wanted.volume:
        for_volume = torch.zeros_like(volume)
        scatter(local, samples, for_volume)
    if wanted.rotation or wanted.shift:
        slices, slopes = _interpolate(volume, samples, slopes=wanted.rotation)
    if wanted.rotation:
        turned = _conjugate(local, samples.sign) * (samples.inside * samples.sign)
        along = torch.stack([turned.real * s.real + turned.imag * s.imag for s in slopes], dim=1)
        first_two = scale * torch.stack([(along * kx).sum(-1), (along * ky).sum(-1)], dim=-1)
        for_rotation = torch.nn.functional.pad(first_two, (0, 1))
    if wanted.shift:
        # d image / d t = -2 pi i k / N image, and Re conj(-i a) g = Im conj(a) g.
        along_k = slices.real * local.imag - slices.imag * local.real
        turn = torch.stack([(along_k * kx).sum(-1), (along_k * ky).sum(-1)], dim=-1)
        for_shift = (-2 * math.pi / box_size) * turn
    return Gradients(for_volume, for_rotation, for_shift)
