"""The CTF against the textbook formula in double precision with CODATA constants."""

import itertools

import numpy as np
import pytest
import torch
from scipy import constants

from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels

BOX, PIXEL_SIZE = 128, 1.2


def wavelength(kv: float) -> float:
    """Relativistic electron wavelength in Å (Kirkland 2020, eq. 2.5)."""
    energy, rest = kv * 1e3 * constants.e, constants.m_e * constants.c**2
    return constants.h * constants.c / np.sqrt(energy * (2 * rest + energy)) * 1e10


def reference(u, v, angle, kv, cs, w, phase, kx, ky) -> np.ndarray:
    """sin(pi lambda D s^2 - pi/2 Cs lambda^3 s^4 + phase + asin w), D by the angle of k from +x (RELION, CTFFIND)."""
    s2 = (kx**2 + ky**2) / (BOX * PIXEL_SIZE) ** 2
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (np.arctan2(ky, kx) - np.radians(angle)))
    lam = wavelength(kv)
    chi = np.pi * lam * defocus * s2 - np.pi / 2 * cs * 1e7 * lam**3 * s2**2
    return np.sin(chi + np.radians(phase) + np.arcsin(w))


# U, V (Å, one pair with U < V, one overfocus), angle, kV, Cs, amplitude contrast, phase shift
CASES = list(
    itertools.product(
        [(5000.0, 5000.0), (21000.0, 18000.0), (18000.0, 21000.0), (30000.0, 29000.0), (-4000.0, -6000.0)],
        [0.0, 35.0, 90.0, -110.0],
        [(300.0, 2.7), (200.0, 1.4), (100.0, 0.001)],
        [0.0, 0.07, 0.1, 1 - 1e-3],
        [0.0, 90.0],
    )
)


@pytest.fixture(scope="module")
def cases() -> tuple[np.ndarray, CtfParameters]:
    table = np.array([[u, v, angle, kv, cs, w, phase] for (u, v), angle, (kv, cs), w, phase in CASES])
    return table, CtfParameters(*torch.from_numpy(table.T.astype(np.float32)))


def test_contrast_transfer_matches_the_formula(cases):
    table, parameters = cases
    pixels = fourier_pixels(BOX)
    ours = contrast_transfer(parameters, pixels.kx, pixels.ky, BOX, PIXEL_SIZE).numpy()
    kx, ky = pixels.kx.double().numpy(), pixels.ky.double().numpy()
    theirs = np.stack([reference(*row, kx, ky) for row in table])
    # Phases reach 600 rad, and single precision keeps 6e-8 of that over a few operations.
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_ctf_at_the_origin_is_plus_the_amplitude_contrast(cases):
    table, parameters = cases
    origin = torch.zeros(1)
    ours = contrast_transfer(parameters, origin, origin, BOX, PIXEL_SIZE)[:, 0].numpy()
    no_plate = table[:, 6] == 0
    np.testing.assert_allclose(ours[no_plate], table[no_plate, 5], atol=1e-4)
    assert np.isfinite(ours).all()


def test_swapping_u_and_v_is_a_quarter_turn(cases):
    _, p = cases
    turned = CtfParameters(
        p.defocus_v, p.defocus_u, p.astigmatism_angle + 90, p.voltage, p.spherical_aberration, p.amplitude_contrast,
        p.phase_shift,
    )  # fmt: skip
    pixels = fourier_pixels(32)
    a, b = (contrast_transfer(x, pixels.kx, pixels.ky, BOX, PIXEL_SIZE) for x in (p, turned))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_underfocus_with_positive_contrast_starts_positive_and_rises():
    parameters = CtfParameters(*(torch.tensor([x]) for x in (10000.0, 10000.0, 0.0, 300.0, 2.7, 0.1, 0.0)))
    k = torch.arange(5.0)
    curve = contrast_transfer(parameters, k, torch.zeros(5), BOX, PIXEL_SIZE)[0]
    assert curve[0].item() == pytest.approx(0.1, abs=1e-5)
    assert bool((curve.diff() > 0).all())
