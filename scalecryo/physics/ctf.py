"""The contrast transfer function in RELION's units, with its sign and its astigmatism axis fixed here.

CTF(k) = sin(pi lambda D(k) s^2 - pi/2 Cs lambda^3 s^4 + phase_shift + atan(w / sqrt(1 - w^2)) - e(k)),

s = |k| / (N px), with e an even phase (`physics.aberrations`) and px the pixel size in Å. Positive defocus D is
underfocus; without a phase plate CTF(0) = +w, the amplitude contrast. RELION and torch-ctf agree; cryoDRGN and ASPIRE
use the opposite sign.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch_ctf
from jaxtyping import Float, Shaped
from torch import Tensor

from scalecryo.physics.aberrations import zernike_phase

_UM_PER_ANGSTROM = 1e-4


@dataclass(frozen=True, eq=False)
class CtfParameters:
    """CTF parameters of b images."""

    defocus_u: Float[Tensor, " b"]
    """Å, positive underfocus, along `astigmatism_angle`."""
    defocus_v: Float[Tensor, " b"]
    """Å, across it."""
    astigmatism_angle: Float[Tensor, " b"]
    """Degrees from the image's +x axis, towards +y, to the axis of `defocus_u`."""
    voltage: Float[Tensor, " b"]
    """kV."""
    spherical_aberration: Float[Tensor, " b"]
    """mm."""
    amplitude_contrast: Float[Tensor, " b"]
    """Fraction in [0, 1)."""
    phase_shift: Float[Tensor, " b"]
    """Degrees, of a phase plate."""
    even_phase: Float[Tensor, "b t"] | None = None
    """Zernike coefficients of the even phase, radians and Å^n; None: there is none."""

    def __len__(self) -> int:
        return self.defocus_u.shape[0]

    def to(self, device: torch.device | str) -> "CtfParameters":
        """The same parameters on another device."""
        return self._each(lambda values: values.to(device))

    def select(self, index: Shaped[Tensor, " m"] | slice) -> "CtfParameters":
        """The parameters of some of the images: an index tensor or a slice."""
        return self._each(lambda values: values[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "CtfParameters":
        given = {column.name: getattr(self, column.name) for column in fields(self)}
        return CtfParameters(**{name: change(values) for name, values in given.items() if values is not None})


def contrast_transfer(
    parameters: CtfParameters,
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    box_size: int,
    pixel_size: float,
) -> Float[Tensor, "b p"]:
    """CTF of every image at the given Fourier pixels.

    Args:
        parameters: of b images; U < V is as good as the two swapped and the angle turned by 90 degrees.
        kx: cycles per box.
        ky: cycles per box.
        box_size: px, of the box that kx and ky refer to (twice the image's for a padded CTF).
        pixel_size: Å.

    Source: phase by torch-ctf; astigmatism as in RELION's and CTFFIND's
    D(k) = (U + V)/2 + (U - V)/2 cos 2(theta - angle), without computing theta.
    """
    step = 1.0 / (box_size * pixel_size)
    x, y = kx * step, ky * step
    squared = x * x + y * y
    # cos 2 theta and sin 2 theta; at the origin, where theta means nothing, both become 0 and s^2 = 0 takes the rest.
    inverse = 1.0 / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    cos2, sin2 = (x * x - y * y) * inverse, 2 * x * y * inverse

    mean, along, across = _defocus_terms(parameters)
    defocus_um = _UM_PER_ANGSTROM * (mean + along * cos2 + across * sin2)
    phase = torch_ctf.calculate_total_phase_shift(
        defocus_um,
        parameters.voltage[:, None],
        parameters.spherical_aberration[:, None],
        parameters.phase_shift[:, None],
        parameters.amplitude_contrast[:, None],
        squared,
    )
    if parameters.even_phase is not None:
        groups, which = torch.unique(parameters.even_phase, dim=0, return_inverse=True)
        phase = phase + zernike_phase(groups, x, y, odd=False)[which]
    # torch-ctf counts the phase with the opposite sign.
    return -torch.sin(phase)


def ctf_power_in_box(
    parameters: CtfParameters,
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    box_size: int,
    pixel_size: float,
) -> Float[Tensor, "b p"]:
    """What CTF² amounts to for images that were cut out to a box: CTF², smoothed by the box.

    CTF² = (1 - cos 2 chi) / 2. Where the cosine turns fast, its signal lies far from the particle: locally at the
    displacement d = grad(2 chi) / 2 pi, of which the box keeps the share (1 - |dx| / L)(1 - |dy| / L), L the box's
    edge. Without this, pixels near Nyquist of a small box are weighted by an aliased CTF².

    Args:
        parameters, kx, ky, box_size, pixel_size: as in `contrast_transfer`.

    Source: stationary phase; the tests compare with the transform of the windowed point spread.
    """
    step = 1.0 / (box_size * pixel_size)
    x, y = kx * step, ky * step
    mean, along, across = _defocus_terms(parameters)
    wavelength = torch_ctf.calculate_relativistic_electron_wavelength(1e3 * parameters.voltage)[:, None] * 1e10
    aberration = 1e7 * parameters.spherical_aberration[:, None] * wavelength**3 * (x * x + y * y)
    dx = 2 * (wavelength * ((mean + along) * x + across * y) - aberration * x)
    dy = 2 * (wavelength * (across * x + (mean - along) * y) - aberration * y)
    kept = (1 - dx.abs() * step).clamp_min(0) * (1 - dy.abs() * step).clamp_min(0)
    cosine = 1 - 2 * contrast_transfer(parameters, kx, ky, box_size, pixel_size).square()
    return 0.5 * (1 - kept * cosine)


def _defocus_terms(parameters: CtfParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Mean defocus, and the parts that go with cos 2 theta and sin 2 theta, Å, each (b, 1)."""
    half = 0.5 * (parameters.defocus_u - parameters.defocus_v)
    twice = torch.deg2rad(2 * parameters.astigmatism_angle)
    mean = 0.5 * (parameters.defocus_u + parameters.defocus_v)
    return mean[:, None], (half * twice.cos())[:, None], (half * twice.sin())[:, None]
