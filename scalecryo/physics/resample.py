"""Another grid for a map: any box and pixel size, by band-limited interpolation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import check_even_box


def resample(
    volume: Float[Tensor, "d h w"],
    pixel_size: float,
    box_size: int,
    new_pixel_size: float,
    centre: Sequence[float] | None = None,
) -> Float[Tensor, "n n n"]:
    """A map on a cube of another box and pixel size; values are kept, frequencies beyond the new Nyquist are cut.

    Each axis is interpolated by the Dirichlet kernel of its own length, which is exact for a band-limited map. Where
    the cube reaches beyond the map there is what most of the map holds: its median.

    Args:
        volume: [z, y, x], of any lengths.
        pixel_size: Å, of it.
        box_size: of the cube, even.
        new_pixel_size: Å, of the cube.
        centre: (x, y, z), index in the map of what is to lie at n//2 of the cube; None: the middle voxels, n//2.

    Raises:
        InputError: an odd box.
    """
    check_even_box(box_size)
    middle = [length // 2 for length in reversed(volume.shape)] if centre is None else list(centre)
    background = volume.median()
    found = (volume - background).float()
    for axis, at in zip((2, 1, 0), middle, strict=True):
        kernel = _kernel(volume.shape[axis], box_size, new_pixel_size / pixel_size, at).to(found)
        found = torch.tensordot(found, kernel, dims=([axis], [1])).movedim(-1, axis)
    return found + background


def _kernel(length: int, box_size: int, step: float, centre: float) -> Float[Tensor, "n m"]:
    """Weights of an axis's samples at `centre` + (j - n/2) · step; none beyond its ends."""
    place = centre + (torch.arange(box_size, dtype=torch.float64) - box_size // 2) * step
    highest = min((length - 1) // 2, math.ceil(length / (2 * step)) - 1)
    phase = (place[:, None] - torch.arange(length, dtype=torch.float64)) * (2 * math.pi / length)
    # 1 + 2 Σ cos(k φ) = sin((K + 1/2) φ) / sin(φ/2)
    half = phase / 2
    near = half.sin().abs() < 1e-9
    ratio = torch.where(near, 2 * highest + 1.0, ((2 * highest + 1) * half).sin() / torch.where(near, 1, half.sin()))
    inside = (place >= -0.5) & (place <= length - 0.5)
    return ratio / length * inside[:, None]


def density_centre(volume: Float[Tensor, "d h w"], sigmas: float = 3.0) -> list[float]:
    """Index (x, y, z) of the centre of mass of what stands out of a map by so many standard deviations."""
    density = volume.double() - volume.double().mean() - sigmas * volume.double().std()
    density = density.clamp_min(0)
    total = float(density.sum())
    if total <= 0:
        return [length // 2 for length in reversed(volume.shape)]
    found = []
    for axis in (2, 1, 0):
        line = torch.arange(volume.shape[axis], dtype=torch.float64)
        found.append(float((density.sum(tuple({0, 1, 2} - {axis})) * line).sum()) / total)
    return found
