"""Poses of a batch against a reference: exhaustive search, separated modes, polish, choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.map.noise import NoiseSpectrum
from scalecryo.physics.candidates import PoseCandidates
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.polish import polish
from scalecryo.pose.search import grid_posterior, templates, turned_grid, with_mates
from scalecryo.train.observed import Observed

SEPARATION_DEG = 25.0
KEEP = 64


@dataclass(frozen=True)
class Reference:
    """A map that poses are sought against.

    Attributes:
        transform: padded and ready to be sliced.
        scale: samples a cycle per box.
        noise: spectrum in the units of the images' transforms at the same level.
        pixels: the level's Fourier pixels, up to the highest radius in use.
    """

    transform: Tensor
    scale: float
    noise: NoiseSpectrum
    pixels: FourierPixels


@dataclass(frozen=True)
class Refined:
    """The chosen pose of each particle.

    Attributes:
        rotation, shift_px: at the reference's level.
        confidence: posterior probability among the candidates that were polished.
        cost: negative log-likelihood up to a constant of the image.
    """

    rotation: Float[Tensor, "b 3 3"]
    shift_px: Float[Tensor, "b 2"]
    confidence: Float[Tensor, " b"]
    cost: Float[Tensor, " b"]


class GridSearch:
    """Exhaustive search of a reference at one radius, over a grid turned at random for each batch."""

    def __init__(
        self,
        reference: Reference,
        grid: Float[Tensor, "h 3 3"],
        radius: float,
        shift_grid_px: Float[Tensor, "t 2"],
        generator: torch.Generator,
    ) -> None:
        self.reference = reference
        self.near = reference.pixels.prefix(radius)
        self.weight = reference.noise.pixel_weight(self.near)
        self.shifts = shift_grid_px
        half = turned_grid(grid, generator)
        self.rotations = with_mates(half)
        self.bank = templates(reference.transform, half, self.near, reference.scale)

    def modes(self, own: Observed, count: int) -> PoseCandidates:
        """The `count` best separated modes of each particle."""
        near = own.prefix(len(self.near))
        posterior = grid_posterior(near.images, near.ctf, self.weight, self.bank, self.shifts, self.near, keep=KEEP)
        found = posterior.candidates(self.rotations, self.shifts)
        return separated_modes(found, count, SEPARATION_DEG)


def polish_candidates(
    own: Observed,
    candidates: PoseCandidates,
    reference: Reference,
    radii: Sequence[float],
    passes: int,
    *,
    fit_shift: bool,
) -> Refined:
    """Polish every candidate at rising radii, then keep the likeliest at the last one.

    Two candidates that end within a degree of each other are one: only separate ones share the probability.
    """
    count, each = candidates.rotation.shape[:2]
    image = torch.arange(count, device=own.images.device).repeat_interleave(each)
    rotation, shift = candidates.rotation.flatten(0, 1), candidates.shift_px.flatten(0, 1)
    repeated = own if each == 1 else own.select(image)
    cost = rotation.new_zeros(len(rotation))
    for radius in radii:
        near = reference.pixels.prefix(radius)
        part = repeated.prefix(len(near))
        found = polish(
            reference.transform, part.images, rotation, shift, part.ctf, reference.noise.pixel_weight(near), near,
            reference.scale, passes=passes, fit_shift=fit_shift,
        )  # fmt: skip
        rotation, shift, cost = found.rotation, found.shift_px, found.cost
    rotation, shift = rotation.unflatten(0, (count, each)), shift.unflatten(0, (count, each))
    cost = cost.unflatten(0, (count, each))
    best = cost.argmin(1)
    row = torch.arange(count, device=best.device)
    apart = geodesic_angle(rotation, rotation[row, best][:, None].expand_as(rotation)) > 1.0
    lead = cost[row, best]
    others = torch.where(apart, (lead[:, None] - cost).exp(), torch.zeros_like(cost)).sum(1)
    return Refined(rotation[row, best], shift[row, best], (1 / (1 + others)).float(), lead.float())


def join(first: PoseCandidates, second: PoseCandidates) -> PoseCandidates:
    """Candidates of both, side by side."""
    return PoseCandidates(
        torch.cat([first.rotation, second.rotation], 1),
        torch.cat([first.shift_px, second.shift_px], 1),
        torch.cat([first.log_weight, second.log_weight], 1),
    )
