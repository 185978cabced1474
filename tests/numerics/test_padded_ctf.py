"""The CTF on a padded box: adjoint of what the simulator does, and the power that is left in the box."""

import math

import numpy as np
import torch

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.ctf import CtfParameters, contrast_transfer, ctf_power_in_box
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred
from scalecryo.physics.image_formation import ctf_weighted, ctf_weighted_on_padded_box

BOX, PIXEL_SIZE = 96, 1.0


def optics(count: int, *, low: float = 4000.0, high: float = 12000.0) -> CtfParameters:
    uniform = torch.linspace(0, 1, count, dtype=torch.float64)
    defocus = low + (high - low) * uniform
    return CtfParameters(
        defocus + 200, defocus - 200, 180 * uniform, torch.full_like(uniform, 300.0), torch.full_like(uniform, 2.7),
        torch.full_like(uniform, 0.1), torch.zeros_like(uniform),
    )  # fmt: skip


def plane(box: int) -> tuple[torch.Tensor, torch.Tensor]:
    ky, kx = torch.meshgrid(
        torch.fft.fftfreq(box, 1 / box, dtype=torch.float64), torch.arange(box // 2 + 1.0).double(), indexing="ij"
    )
    return kx.flatten(), ky.flatten()


def recorded(images: torch.Tensor, parameters: CtfParameters) -> torch.Tensor:
    """Images after the microscope, cut out of a wide field of four boxes, where nothing wraps around."""
    box, edge = 4 * BOX, 3 * BOX // 2
    ctf = contrast_transfer(parameters, *plane(box), box, PIXEL_SIZE).view(len(images), box, -1)
    wide = irfft2_centred(rfft2_centred(torch.nn.functional.pad(images, (edge,) * 4)) * ctf, box)
    return wide[:, edge:-edge, edge:-edge]


def test_filtering_is_the_adjoint_of_recording() -> None:
    # Reference: <A x, y> = <x, Aᵀ y> for any two images. The padded box of two is wide enough while the displacement,
    # lambda D s = 0.0197 · 12000 · 0.2 = 47 Å at |k| = N/5, stays below half the box; x and y hold only such pixels.
    generator = torch.Generator().manual_seed(0)
    pixels = fourier_pixels(BOX).to(dtype=torch.float64)
    low = pixels.prefix(0.2 * BOX)
    x, y = (
        irfft2_centred(low.unpack(low.pack(rfft2_centred(
            torch.randn(3, BOX, BOX, dtype=torch.float64, generator=generator)))), BOX)
        for _ in range(2)
    )  # fmt: skip
    parameters = optics(3)
    values = ctf_weighted_on_padded_box(y, parameters, PIXEL_SIZE, pixels).values
    back = irfft2_centred(pixels.unpack(values), BOX)
    forward = (recorded(x, parameters) * y).sum((1, 2))
    # Tolerance: the box's edges cut both images sharply, which spreads 1e-2 of them past |k| = N/5.
    assert torch.allclose(forward, (x * back).sum((1, 2)), rtol=0.02, atol=0.02 * float(forward.abs().mean()))


def test_power_in_the_box_is_that_of_the_windowed_point_spread() -> None:
    # Reference: the transform of CTF² on a box of four, multiplied in real space by the share of the box that it and
    # its copy at that displacement have in common. Tolerance: stationary phase neglects the chirp's curvature where the
    # window has a kink (none displaced, or by the whole box): sqrt(lambda D) / L = 9 to 16 % there, little elsewhere.
    parameters = optics(4)
    box, edge = 4 * BOX, BOX
    ctf = contrast_transfer(parameters, *plane(box), box, PIXEL_SIZE).view(4, box, -1)
    spread = irfft2_centred((ctf * ctf).to(torch.complex128), box)[:, edge:-edge, edge:-edge]
    axis = (1 - (torch.arange(2 * BOX, dtype=torch.float64) - BOX).abs() / BOX).clamp_min(0)
    pixels = fourier_pixels(BOX).to(dtype=torch.float64)
    wanted = pixels.pack(rfft2_centred(spread * axis[:, None] * axis)[:, ::2, ::2].contiguous()).real
    found = ctf_power_in_box(parameters, pixels.kx, pixels.ky, BOX, PIXEL_SIZE)
    assert float((found - wanted).abs().mean()) < 0.005
    assert float((found - wanted).abs().max()) < 0.16
    # An aliased CTF² is far from it: the check can fail.
    plain = contrast_transfer(parameters, pixels.kx, pixels.ky, BOX, PIXEL_SIZE).square()
    assert float((plain - wanted).abs().mean()) > 0.1


def test_a_reconstruction_with_it_keeps_more_of_the_signal() -> None:
    # Reference: the projections before the microscope, all down one axis: the slice at kz = 0 of the map. White noise
    # is what the box cuts off; Fourier shells near Nyquist must correlate better than with the CTF on the bare box.
    generator = torch.Generator().manual_seed(1)
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    clean = torch.zeros(BOX, BOX, dtype=torch.float64)
    for cx, cy in torch.randn(60, 2, generator=generator) * 10:
        clean += torch.from_numpy(np.exp(-((x - float(cx)) ** 2 + (y - float(cy)) ** 2) / 2))
    parameters = optics(60)
    images = recorded(clean.expand(60, -1, -1), parameters).float()
    images += 0.2 * torch.randn(images.shape, generator=generator)
    pixels = fourier_pixels(BOX)
    truth = pixels.pack(rfft2_centred(clean.float()))
    ctf = contrast_transfer(parameters, pixels.kx, pixels.ky, BOX, PIXEL_SIZE).float()
    ring = (pixels.radius > 0.35 * BOX) & (pixels.radius < 0.48 * BOX)
    correlation = []
    for part in (
        ctf_weighted(pixels.pack(rfft2_centred(images)), ctf),
        ctf_weighted_on_padded_box(images, parameters, PIXEL_SIZE, pixels),
    ):
        accumulator = Backprojection(BOX)
        accumulator.insert(
            type(part)(part.values.to(torch.complex64), part.power.float()),
            torch.eye(3).expand(60, 3, 3), torch.zeros(60, 2), torch.ones(60), pixels,
        )  # fmt: skip
        slab = pixels.pack(rfft2_centred(accumulator.solve_one().sum(0)))
        cross = (slab[ring] * truth[ring].conj()).real.sum()
        correlation.append(float(cross / (slab[ring].abs().square().sum() * truth[ring].abs().square().sum()).sqrt()))
    assert math.isfinite(correlation[0])
    assert correlation[1] > correlation[0] + 0.05
