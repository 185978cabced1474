"""From source pixels to stored pixels: protein-bright, background of mean 0 and σ 1.

The background is what lies outside a circle of 0.375 box around the centre (the rule of RELION's particle extraction).
Stacks without noise, simulations mostly, have no background σ worth dividing by: they share one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from scalecryo.data.conversion.background import measure_background, rescale

Array = npt.NDArray[np.float32]

BACKGROUND_RADIUS = 0.375  # of the box
_CENTRE_RADIUS = 0.25
# Noise below −30 dB of the variance inside the circle: no real micrograph comes near.
_NOISE_FREE = 1e-3
_DARK_SIGMAS = 4.0


@dataclass(frozen=True)
class Normalisation:
    """How an image is stored.

    Args:
        box_size: box of the full level, px; the source is Fourier-cropped to it first.
        sign: −1 where the source is protein-dark.
        kind: divide by each image's background σ, or by one common scale.
        common_scale: that scale.
    """

    box_size: int
    sign: int = 1
    kind: Literal["background", "common"] = "background"
    common_scale: float = 1.0


@lru_cache(maxsize=8)
def _radius(box_size: int) -> npt.NDArray[np.float64]:
    axis = np.arange(box_size) - box_size // 2
    radius: npt.NDArray[np.float64] = np.hypot(axis[:, None], axis[None, :]).reshape(-1)
    return radius


@lru_cache(maxsize=8)
def _background_weight(box_size: int) -> Array:
    """1 / number of background pixels there, 0 inside the circle; flat."""
    outside = _radius(box_size) > BACKGROUND_RADIUS * box_size
    return (outside / np.count_nonzero(outside)).astype(np.float32)


def crop(images: Array, box_size: int) -> Array:
    """Fourier-crop images (n, N, N) to a smaller box, noise preserving."""
    return images if images.shape[-1] == box_size else crops(images, (box_size,))[0]


def crops(images: Array, box_sizes: Sequence[int]) -> list[Array]:
    """Fourier-crop images (n, N, N) to several smaller boxes, as `fourier_crop_2d` does, from one transform of them.

    Only the columns that some box keeps are transformed, and the origin stays where it is: centring would turn the sign
    of every other coefficient, which cropping an even box to an even box turns back.
    """
    if not box_sizes:
        return []
    full, keep = images.shape[-1], max(box_sizes) // 2
    rows = torch.fft.rfft(torch.from_numpy(aligned(images)))[..., :keep]
    low = torch.fft.fft(rows, dim=-2)
    out: list[Array] = []
    for box in box_sizes:
        half = box // 2
        part = low.new_zeros((len(images), box, half + 1))
        torch.mul(low[:, :half, :half], box / full, out=part[:, :half, :half])
        torch.mul(low[:, full - half + 1 :, :half], box / full, out=part[:, half + 1 :, :half])
        out.append(torch.fft.irfft2(part, s=(box, box)).numpy())
    return out


def aligned(images: Array) -> Array:
    """The same images in memory that starts where torch's vector code likes it, copied there if need be.

    Sums over vectors that start elsewhere are added in another order: the last bit of a stored pixel would depend on
    where NumPy happened to put the images.
    """
    if images.ctypes.data % 64 == 0:
        return images
    copied: Array = torch.from_numpy(images).clone().numpy()
    return copied


def _background(flat: Array) -> tuple[Array, Array, Array]:
    """Background mean of every flat image (n, N²) in two parts, and the background's σ."""
    mean, rest, sigma = (np.empty(len(flat), np.float32) for _ in range(3))
    measure_background(flat, _background_weight(round(flat.shape[1] ** 0.5)), mean, rest, sigma)
    return mean, rest, sigma


def normalise(images: Array, normalisation: Normalisation) -> tuple[Array, Array, Array]:
    """Stored pixels of source images, and the mean and scale with which source = sign · (stored · scale + mean).

    Images that are constant, or have pixels that are not finite, come out as not finite: the caller names them.

    Args:
        images: source (n, N, N); overwritten where no cropping is needed.
        normalisation: how.
    """
    images = crop(images, normalisation.box_size)
    flat = images.reshape(len(images), -1)
    first, rest, sigma = _background(flat)
    mean = first + rest
    if normalisation.kind == "background":
        # A constant image leaves only the rounding of its mean.
        scale = np.where(sigma > 1e-6 * np.abs(mean), sigma, np.float32(np.nan))
    else:
        constant = flat.max(axis=1) == flat.min(axis=1)
        scale = np.where(constant, np.float32(np.nan), np.float32(normalisation.common_scale))
    rescale(flat, first, rest, (normalisation.sign / scale).astype(np.float32))
    return images, np.float32(normalisation.sign) * mean, scale


def choose_normalisation(sample: Array, box_size: int, sign: int | None) -> tuple[Normalisation, str]:
    """The normalisation for a stack, decided once from a sample of its images, and a line that says why.

    Args:
        sample: source images (n, N, N), finite and not constant; overwritten.
        box_size: box of the full level, px.
        sign: the sign asked for; None to judge by whether the centre is darker than the background.
    """
    images = crop(sample, box_size)
    flat = images.reshape(len(images), -1)
    mean, rest, sigma = _background(flat)
    rescale(flat, mean, rest, np.ones_like(mean))
    radius = _radius(box_size)
    inside = flat[:, radius <= BACKGROUND_RADIUS * box_size].std(axis=1)
    power = np.square(np.abs(np.fft.fft2(images)))
    frequency = np.fft.fftfreq(box_size, 1 / box_size)
    corner = np.hypot(frequency[:, None], frequency[None, :]) > box_size / 2
    # White noise has the same power at every frequency: the corners, where no projection reaches, measure it.
    noise = np.minimum(power[:, corner].mean(axis=1) / box_size**2, np.square(sigma))
    free = float(np.median(noise / np.maximum(np.square(inside), np.finfo(np.float32).tiny))) < _NOISE_FREE
    scale = float(inside.mean()) if free else 1.0
    judged, reason = _judge_sign(flat, inside if free else sigma, radius)
    if sign is not None:
        judged, reason = sign, "as asked"
    return Normalisation(box_size, judged, "common" if free else "background", scale), reason


def _judge_sign(flat: Array, sigma: Array, radius: npt.NDArray[np.float64]) -> tuple[int, str]:
    """−1 when the centre is darker than the background by more than its error allows."""
    box_size = round(len(radius) ** 0.5)
    centre = flat[:, radius < _CENTRE_RADIUS * box_size]
    usable = sigma > 0
    contrast = centre.mean(axis=1, dtype=np.float64)[usable] / sigma[usable]
    if not len(contrast):
        return 1, "no contrast to judge by"
    # The error by scatter, but not below that of white noise: few images scatter little by chance.
    floor = np.sqrt(1 / centre.shape[1] + 1 / np.count_nonzero(_background_weight(box_size)))
    error = max(float(contrast.std()), float(floor)) / np.sqrt(len(contrast))
    average = float(contrast.mean())
    sigmas = average / error
    shown = f"centre {average:+.3f} σ from the background, {abs(sigmas):.0f} times its error"
    if sigmas < -_DARK_SIGMAS:
        return -1, f"protein is dark: {shown}"
    return 1, f"protein is bright: {shown}" if sigmas > _DARK_SIGMAS else f"contrast unclear, kept: {shown}"
