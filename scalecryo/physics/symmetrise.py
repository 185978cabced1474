"""Sums over images made symmetric: as if every image had been inserted at all of its symmetry-related poses."""

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from scalecryo.physics.fourier_slice import add_friedel_pairs, extract_slices, padded_box
from scalecryo.physics.kernels.backend import choose_backend
from scalecryo.physics.kernels.cpu_symmetrise import add_copies_cpu

_AT_ONCE = 1 << 20
_WHOLE = 1e-5


def with_copies(
    numerator: Complex[Tensor, "m d d h"],
    denominator: Float[Tensor, "m d d h"],
    rotations: Float[Tensor, "e 3 3"],
    radius: float,
) -> tuple[Complex[Tensor, "m d d h"], Float[Tensor, "m d d h"]]:
    """N(k) + Σ_g N(g k) of sums as `insert_slices` makes them, trilinear between the grid's points.

    Nothing is divided by the number of copies: numerator and denominator grow alike (as RELION does it, Scheres 2012).

    Args:
        numerator, denominator: of several maps; half-complex, before `add_friedel_pairs`.
        rotations: g, without the identity.
        radius: samples of the grid up to which anything was inserted.
    """
    size = numerator.shape[1]
    radius = min(radius, size // 2 - 1)
    exact, others = _split(rotations)
    # Hermitian: a copy reads both sides of the plane kx = 0.
    values, powers = (
        torch.stack([add_friedel_pairs(one.clone()) for one in sums]) for sums in (numerator, denominator)
    )
    for turns in (exact, others):
        if len(turns) and choose_backend(values) == "cpu":
            values, powers = add_copies_cpu(values, powers, turns, radius)
        elif len(turns):
            values, powers = _by_slices(values, powers, turns, radius)
    for sums in (values, powers):  # which `add_friedel_pairs` will double
        sums[..., 0] *= 0.5
    return values, powers


def _split(rotations: Float[Tensor, "e 3 3"]) -> tuple[Float[Tensor, "a 3 3"], Float[Tensor, "b 3 3"]]:
    """A group as a product, g = e c: its turns e that take the grid to itself, and one c of each coset; no identities.

    Copies under e are exact, and Σ_c of them costs |c| instead of |e| |c| copies (60 become 3 and 14).
    """
    whole = torch.eye(3).to(rotations)[None]
    every = torch.cat([whole, rotations])
    exact = every[_keeps_the_grid(every)].round()
    cosets, known = whole, exact
    for rotation in rotations:
        if float((known - rotation).abs().amax((1, 2)).min()) > 100 * _WHOLE:
            cosets, known = torch.cat([cosets, rotation[None]]), torch.cat([known, exact @ rotation])
    return exact[1:], cosets[1:]


def _keeps_the_grid(rotations: Float[Tensor, "e 3 3"]) -> Bool[Tensor, " e"]:
    """Whether grid points go to grid points: along axes, or axis to axis."""
    return ((rotations - rotations.round()).abs() < _WHOLE).all(2).all(1)


def _by_slices(numerator: Tensor, denominator: Tensor, rotations: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The same by the slice operator, on any device: a slice of one pixel for each point."""
    size, device = numerator.shape[1], numerator.device
    line = torch.fft.fftfreq(size, 1 / size, device=device)
    kz, ky, kx = torch.meshgrid(line, line, torch.arange(size // 2 + 1.0, device=device), indexing="ij")
    place = torch.stack([kx, ky, kz], -1).view(-1, 3)
    reached = (place.square().sum(1) <= radius**2).nonzero()[:, 0]  # host sync
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    result, weight = numerator.clone(), denominator.clone()
    for some in reached.split(_AT_ONCE):
        for rotation in rotations.to(place):
            columns = torch.nn.functional.pad((place[some] @ rotation.T)[:, :, None], (0, 2))
            for number in range(len(numerator)):
                values = extract_slices(numerator[number], columns, one, zero, 1.0)[:, 0]
                result[number].view(-1)[some] += values
                powers = extract_slices(denominator[number].to(numerator.dtype), columns, one, zero, 1.0)[:, 0]
                weight[number].view(-1)[some] += powers.real
    return result, weight


def copies_correction(box_size: int, padding: float, rotations: Float[Tensor, "e 3 3"]) -> Float[Tensor, "n n n"]:
    """`gridding_correction` of a map from sums with copies, which were interpolated twice.

    Inserting multiplies the map by s(x) = sinc²(x/d) along each axis, and reading a copy at g k between the grid's
    points by s(g x) once more: its share has s(g x)², that of turns that take the grid to itself s(x). The mean of
    these is undone.
    """
    size = padded_box(box_size, padding)
    line = (torch.arange(box_size, device=rotations.device) - box_size // 2).float() / size
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    place = torch.stack([x, y, z], -1)
    kept = _keeps_the_grid(rotations)
    total = (1 + int(kept.sum())) * torch.sinc(place).square().prod(-1)  # host sync: once a map
    for rotation in rotations[~kept].float():
        total += torch.sinc(place @ rotation.T).pow(4).prod(-1)
    return (1 + len(rotations)) / total
