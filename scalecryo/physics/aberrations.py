"""What a microscope's optics do beside defocus: phases over the back focal plane, and anisotropic magnification.

An image's transform is exp(i odd(q)) CTF(q) V(q) at q = M k, with k the recorded frequency (Zivanov et al. 2020, IUCrJ
7:253). The odd phase (beam tilt, trefoil) moves and skews; it is taken off the images. The even one (tetrafoil,
errors of defocus and Cs) changes the CTF, sin(chi - even). M is taken off the images by resampling them.

Phases are sums of Zernike polynomials of the frequency in 1/Å, not scaled to any radius, as RELION keeps them. Signs,
order and frames are those of RELION 3.1.3 itself (tests/numerics/test_aberrations.py).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import irfft2_centred, rfft2_centred

ODD_TERMS, EVEN_TERMS = 12, 16  # up to n = 5 and n = 6


@dataclass(frozen=True, eq=False)
class ImageAberrations:
    """What is taken off b images before anything else is done with them.

    Attributes:
        odd: Zernike coefficients of the odd phase, radians and Å^n, by rising n, then m.
        magnification: M, in the frame (x, y).
    """

    odd: Float[Tensor, "b 12"]
    magnification: Float[Tensor, "b 2 2"]


@cache
def zernike_orders(odd: bool, count: int) -> tuple[tuple[int, int], ...]:
    """(n, m) of the first terms: n rises by 2 from 1 (odd) or 0 (even), m by 2 from -n to n."""
    orders = [(n, m) for n in range(int(odd), 2 * count + 2, 2) for m in range(-n, n + 1, 2)]
    return tuple(orders[:count])


def zernike_phase(
    coefficients: Float[Tensor, "g t"], x: Float[Tensor, " p"], y: Float[Tensor, " p"], *, odd: bool
) -> Tensor:
    """Sums of Zernike polynomials, (g, p): R_n^m(r) cos m theta, or R_n^|m|(r) sin |m| theta where m < 0.

    Args:
        coefficients: of each phase.
        x, y: frequency, 1/Å.
        odd: whether the terms are the odd or the even ones.
    """
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    total = coefficients.new_zeros(len(coefficients), len(x))
    for column, (n, m) in enumerate(zernike_orders(odd, coefficients.shape[1])):
        own = coefficients[:, column : column + 1]
        if not bool(own.any()):  # host sync: most terms are nobody's
            continue
        order = abs(m)
        polynomial = sum(
            (-1) ** k * (math.comb(n - k, k) * math.comb(n - 2 * k, (n - order) // 2 - k)) * radius ** (n - 2 * k)
            for k in range((n - order) // 2 + 1)
        )
        total += own * (polynomial * (torch.cos(order * angle) if m >= 0 else torch.sin(order * angle)))
    return total


def corrected_images(
    images: Float[Tensor, "b n n"], aberrations: ImageAberrations, pixel_size: float
) -> Float[Tensor, "b n n"]:
    """Images as an instrument without odd phases and with one magnification would have recorded them.

    The transform at q is that of the image at M^-1 q, less the odd phase at q. Coefficients at Nyquist are dropped.

    Args:
        images: real space, centred at index n//2.
        aberrations: of each; images of one optics group share the work.
        pixel_size: Å.
    """
    kinds = torch.cat([aberrations.odd, aberrations.magnification.flatten(1)], 1)
    groups, which = torch.unique(kinds, dim=0, return_inverse=True)
    out = images.clone()
    for number, (odd, matrix) in enumerate(zip(groups[:, :-4], groups[:, -4:].view(-1, 2, 2), strict=True)):
        own = which == number
        some = images[own]
        if not torch.equal(matrix, torch.eye(2, device=matrix.device)):  # host sync
            some = resampled(some, matrix)
        if bool(odd.any()):  # host sync
            some = _without_phase(some, odd, pixel_size)
        out[own] = some
    return out


def corrected_shift(shift: Float[Tensor, "b 2"], magnification: Float[Tensor, "b 2 2"]) -> Float[Tensor, "b 2"]:
    """Where content of a recorded image sits in the corrected one: M^-T t. Unit of `shift`, (x, y)."""
    return torch.linalg.solve(magnification.mT, shift.unsqueeze(-1)).squeeze(-1)


def recorded_shift(shift: Float[Tensor, "b 2"], magnification: Float[Tensor, "b 2 2"]) -> Float[Tensor, "b 2"]:
    """The inverse of `corrected_shift`: M^T t."""
    return (magnification.mT @ shift.unsqueeze(-1)).squeeze(-1)


def _without_phase(
    images: Float[Tensor, "b n n"], odd: Float[Tensor, " t"], pixel_size: float
) -> Float[Tensor, "b n n"]:
    box_size = images.shape[-1]
    line = torch.fft.fftfreq(box_size, pixel_size, device=images.device, dtype=torch.float32)
    x, y = (k.flatten() for k in torch.broadcast_tensors(line[: box_size // 2], line[:, None]))
    phase = zernike_phase(odd[None], x, y, odd=True).view(box_size, -1)
    phase = torch.nn.functional.pad(phase, (0, 1))
    turn = torch.polar(torch.ones_like(phase), -phase)
    turn[box_size // 2] = turn[:, -1] = 0
    return irfft2_centred(rfft2_centred(images) * turn, box_size)


def resampled(images: Float[Tensor, "b n n"], matrix: Float[Tensor, "2 2"]) -> Float[Tensor, "b n n"]:
    """Images whose transform at q is that of `images` at M^-1 q: det(M) times the images at M^T x.

    Two passes along lines (Catmull & Smith 1980), each by the lines' Fourier series: exact for what lies inside the
    band, so that nothing is smoothed.

    Args:
        images: real space, centred at index n//2.
        matrix: M, close to the identity, in the frame (x, y).
    """
    (a, c), (b, d) = matrix.double().tolist()  # host sync; M^T = [[a, b], [c, d]]
    along_y = _lines(images.mT, d - b * c / a, c / a).mT
    return _lines(along_y, a, b) * (a * d - b * c)


def _lines(images: Float[Tensor, "b m n"], scale: float, slope: float) -> Float[Tensor, "b m n"]:
    """Row u of each image at scale · v + slope · u for every column v, both counted from the centre."""
    rows, columns = images.shape[-2:]
    modes = torch.arange(columns // 2, device=images.device, dtype=torch.float64)
    at = torch.arange(columns, device=images.device, dtype=torch.float64) - columns // 2
    row = torch.arange(rows, device=images.device, dtype=torch.float64) - rows // 2
    step = 2 * math.pi / columns
    ramp = torch.outer(row, modes) * (step * slope)
    series = torch.fft.rfft(images, dim=-1)[..., : columns // 2]
    series = series * torch.polar(torch.ones_like(ramp), ramp).to(series.dtype)
    angle = torch.outer(modes, columns // 2 + scale * at) * step
    weight = torch.full_like(modes, 2.0 / columns)
    weight[0] = 1.0 / columns
    cosine, sine = ((weight[:, None] * part).to(images.dtype) for part in (angle.cos(), angle.sin()))
    return series.real @ cosine - series.imag @ sine
