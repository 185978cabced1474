"""Fourier shell correlation, resolution, power spectra, phase randomisation.

Shells are integer: shell s holds the coefficients whose radius in cycles per box rounds to s, for s = 0 .. N/2; the
corners beyond are left out. Sums run over the full transform (each half-complex coefficient counts as
often as it occurs there).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import check_even_box, irfft3_centred, rfft3_centred


def shell_index_3d(box_size: int, device: torch.device | str | None = None) -> Int[Tensor, "n n h"]:
    """Integer shell of each coefficient of a half-complex 3-D transform, corners included (shells > N/2)."""
    check_even_box(box_size)
    line = torch.fft.fftfreq(box_size, 1 / box_size, device=device, dtype=torch.float64).square()
    half = torch.arange(box_size // 2 + 1, device=device, dtype=torch.float64).square()
    return (line[:, None, None] + (line[:, None] + half)).sqrt().round().long()


def _shell_sums(values: Tensor, box_size: int) -> Float[Tensor, " s"]:
    """Sum of a real half-complex field over each shell of the full transform, in double precision."""
    half = box_size // 2
    # Columns kx = 0 and kx = N/2 are their own Friedel partners.
    weight = torch.full((half + 1,), 2.0, dtype=torch.float64, device=values.device)
    weight[0] = weight[half] = 1.0
    shell = shell_index_3d(box_size, values.device).clamp_max(half + 1)
    sums = torch.zeros(half + 2, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, shell.flatten(), (values.double() * weight).flatten())[: half + 1]


def transform_correlation(
    a: Complex[Tensor, "n n h"], b: Complex[Tensor, "n n h"], smooth: int = 0
) -> Float[Tensor, " s"]:
    """Correlation of two half-complex transforms on shells 0 .. n/2, double precision; 0 where either is empty.

    Args:
        a, b: the transforms.
        smooth: shells to either side whose sums count as well.
    """
    box_size = a.shape[0]
    fields = a.real * b.real + a.imag * b.imag, a.abs().square(), b.abs().square()
    sums = torch.stack([_shell_sums(field, box_size) for field in fields])
    if smooth:
        window = torch.ones(1, 1, 2 * smooth + 1).to(sums)
        sums = torch.nn.functional.conv1d(sums[:, None], window, padding=smooth)[:, 0]
    power = sums[1] * sums[2]
    return torch.where(power > 0, sums[0] / power.clamp_min(torch.finfo(power.dtype).tiny).sqrt(), 0.0)


def fsc(a: Float[Tensor, "n n n"], b: Float[Tensor, "n n n"]) -> Float[Tensor, " n//2+1"]:
    """Fourier shell correlation of two maps on shells 0 .. n/2 (van Heel & Harauz 1986), double precision.

    A shell in which either map is empty gets 0.

    Raises:
        InputError: the maps differ in box size, or the box is odd.
    """
    check_same_box(a, b)
    return transform_correlation(rfft3_centred(a), rfft3_centred(b))


def check_same_box(a: Tensor, b: Tensor) -> None:
    """Raise an InputError where two maps differ in box size."""
    if a.shape != b.shape:
        raise InputError(f"cannot correlate boxes {tuple(a.shape)} and {tuple(b.shape)}: resize one to the other")


def resolution(
    curve: Float[Tensor, " s"] | Sequence[float], box_size: int, pixel_size: float, threshold: float
) -> tuple[float, float]:
    """Where a shell correlation first falls below a threshold: (shell, resolution in Å).

    The crossing is interpolated linearly between integer shells, from shell 1 on. A curve that is below at shell 1
    gives shell 1; one that never falls below gives its last shell.
    """
    values = [float(value) for value in curve]
    shell = float(len(values) - 1)
    for upper in range(1, len(values)):
        if values[upper] < threshold:
            lower = values[upper - 1]
            shell = upper - (threshold - values[upper]) / (lower - values[upper]) if upper > 1 else 1.0
            break
    return shell, box_size * pixel_size / max(shell, 1.0)


def full_map_fsc(curve: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """FSC of two maps of all images by that of halves, 2 FSC / (1 + FSC), from 0 on (Rosenthal & Henderson 2003)."""
    positive = curve.clamp(0, 1)
    return 2 * positive / (1 + positive)


def shell_mean(values: Float[Tensor, "n n h"]) -> Float[Tensor, " s"]:
    """Mean over each shell of a real field given on the half-complex grid."""
    box_size = values.shape[0]
    return _shell_sums(values, box_size) / _shell_sums(torch.ones_like(values), box_size)


def power_spectrum(volume: Float[Tensor, "n n n"]) -> Float[Tensor, " n//2+1"]:
    """Mean squared modulus of a map's unscaled transform in each shell, double precision."""
    return shell_mean(rfft3_centred(volume).abs().square())


def phase_randomise(
    volume: Float[Tensor, "n n n"], from_shell: int, generator: torch.Generator | None
) -> Float[Tensor, "n n n"]:
    """The map with random phases, same moduli, in shells >= from_shell (Chen et al. 2013, for masked FSC).

    The phases are those of real white noise, so the result is real with the moduli exactly kept.
    """
    n = volume.shape[-1]
    source = volume.device if generator is None else generator.device
    noise = torch.randn(volume.shape, generator=generator, device=source, dtype=volume.dtype).to(volume.device)
    transform, random = rfft3_centred(volume), rfft3_centred(noise)
    turned = transform.abs() * torch.exp(1j * random.angle())
    return irfft3_centred(torch.where(shell_index_3d(n, volume.device) >= from_shell, turned, transform), n)


def weight_shells(volume: Float[Tensor, "n n n"], weight: Float[Tensor, " shells"]) -> Float[Tensor, "n n n"]:
    """Multiply each Fourier shell of a map by a weight; shells past the last keep none."""
    box_size = volume.shape[-1]
    shells = shell_index_3d(box_size, volume.device)
    padded = torch.cat([weight, weight.new_zeros(int(shells.max()) + 1 - len(weight))])  # host sync: once per map
    return irfft3_centred(rfft3_centred(volume) * padded[shells], box_size)
