"""Soft masks in real space, centred at index N//2."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import check_even_box, irfft3_centred, rfft3_centred


def soft_sphere(
    box_size: int, radius_px: float, edge_px: float = 3.0, device: torch.device | str | None = None
) -> Float[Tensor, "n n n"]:
    """1 within radius_px of the centre, 0 beyond radius_px + edge_px, a raised cosine between."""
    check_even_box(box_size)
    if radius_px < 0 or edge_px < 0:
        raise InputError(f"mask radius {radius_px:g} px and edge {edge_px:g} px must not be negative: raise them")
    return _raised_cosine(_radius(box_size, device) - radius_px, edge_px)


def soft_disc(
    box_size: int, radius_px: float, edge_px: float = 3.0, device: torch.device | str | None = None
) -> Float[Tensor, "n n"]:
    """`soft_sphere` in the plane: its section through the centre."""
    return soft_sphere(box_size, radius_px, edge_px, device)[box_size // 2]


def _radius(box_size: int, device: torch.device | str | None) -> Float[Tensor, "n n n"]:
    """Distance from the centre in px."""
    squared = (torch.arange(box_size, device=device, dtype=torch.float32) - box_size // 2).square()
    return (squared[:, None, None] + squared[:, None] + squared).sqrt()


def _raised_cosine(distance: Tensor, edge_px: float) -> Tensor:
    """1 where distance <= 0, 0 where distance >= edge_px."""
    if edge_px == 0:
        return (distance <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi * (distance / edge_px).clamp(0, 1))


def mask_from_map(
    volume: Float[Tensor, "n n n"],
    pixel_size: float,
    *,
    low_pass: float | None = None,
    threshold: float = 0.15,
    dilate_px: float = 2.0,
    edge_px: float = 5.0,
) -> Float[Tensor, "n n n"]:
    """Soft mask around the density of a map (protein positive).

    The map is low-passed; voxels above background + max(3 sigma, threshold * (peak - background)) count as particle,
    where background and sigma are the mean and standard deviation outside the largest centred sphere and peak is the
    mean of the 0.1 % highest voxels. That set grows by `dilate_px` and ends in a raised cosine `edge_px` wide.

    Args:
        volume: density, [z, y, x].
        pixel_size: Å.
        low_pass: Å of the Gaussian filter's half-amplitude; default the larger of 15 Å and 2.5 times Nyquist.
        threshold: fraction of the peak, see above.
        dilate_px: px.
        edge_px: px.

    Raises:
        InputError: an odd box, or a map without density above its background.
    """
    box_size = volume.shape[-1]
    check_even_box(box_size)
    smooth = gaussian_low_pass(volume.float(), pixel_size, low_pass or max(15.0, 2.5 * 2 * pixel_size))
    outside = _radius(box_size, volume.device) >= box_size / 2
    background, sigma = smooth[outside].mean(), smooth[outside].std()
    peak = smooth.flatten().topk(max(1, box_size**3 // 1000)).values.mean()
    level = background + torch.maximum(3 * sigma, threshold * (peak - background))
    inside = (smooth > level).float()
    if not bool(inside.any()):
        raise InputError("no density stands out from the map's background: give a map with positive contrast")
    return _grow(inside, dilate_px, edge_px)


def density_radius(volume: Float[Tensor, "n n n"], share: float = 0.95) -> float:
    """Radius in px about the centre within which a share of a map's positive density lies."""
    radius = _radius(volume.shape[-1], volume.device).flatten()
    inside, order = volume.flatten().clamp_min(0), radius.argsort()
    total = inside[order].double().cumsum(0)
    return float(radius[order[int((total < share * total[-1]).sum())]])  # host sync


def centre_of_mass(volume: Float[Tensor, "n n n"], mask: Float[Tensor, "n n n"]) -> Float[Tensor, "3"]:
    """Of a map's positive density within a mask: (x, y, z) in px from the box centre n//2; zero for an empty one."""
    density = (volume * mask).clamp_min(0).double()
    line = torch.arange(volume.shape[-1], dtype=torch.float64, device=volume.device) - volume.shape[-1] // 2
    sums = torch.stack([(density.sum(others) * line).sum() for others in ((0, 1), (0, 2), (1, 2))])
    return (sums / density.sum().clamp_min(1e-30)).float()


def gaussian_low_pass(volume: Tensor, pixel_size: float, resolution: float) -> Tensor:
    """Gaussian filter whose amplitude is one half at 1/resolution."""
    n = volume.shape[-1]
    line = torch.fft.fftfreq(n, pixel_size, device=volume.device).square()
    half = torch.fft.rfftfreq(n, pixel_size, device=volume.device).square()
    squared = line[:, None, None] + line[None, :, None] + half
    return irfft3_centred(rfft3_centred(volume) * torch.exp(-math.log(2) * resolution**2 * squared), n)


def _grow(inside: Tensor, dilate_px: float, edge_px: float) -> Tensor:
    """Dilate a binary mask by a ball, then add a soft edge from balls that grow by at most 1 px."""
    n = inside.shape[-1]
    radius = _radius(n, inside.device)
    transform = rfft3_centred(inside)

    def dilated(by: float) -> Tensor:
        # Correlating with a ball counts the mask voxels within its radius; half a voxel is far above rounding error.
        return irfft3_centred(transform * rfft3_centred((radius <= by).float()), n) > 0.5

    mask = dilated(dilate_px).float()
    steps = math.ceil(edge_px)
    for step in range(1, steps):
        by = edge_px * step / steps
        value = 0.5 + 0.5 * math.cos(math.pi * by / edge_px)
        mask = torch.maximum(mask, value * dilated(dilate_px + by))
    return mask
