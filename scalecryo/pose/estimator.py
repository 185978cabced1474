"""Poses of a batch against a reference: exhaustive search, separated modes, local refinement, choice."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.map.noise import NoiseSpectrum
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.image_formation import form_images, shift_ramp
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.local_refinement import PackedVolume, evaluate_poses, refine_poses
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.search import grid_posterior, templates, turned_grid, with_flips

SEPARATION_DEG = 25.0
KEEP = 64
PRUNE_FRACTION, PRUNE_MARGIN_NATS = 0.1, 20.0  # a share, and nats
SAME = 15.0  # degrees times Fourier pixels: a quarter of the turn that moves the outermost pixel by one


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

    @cached_property
    def volume(self) -> PackedVolume:
        """The transform as local refinement takes it; what it prepares is kept for the next batch."""
        return PackedVolume(self.transform)


@dataclass(frozen=True)
class Refined:
    """The chosen pose of each particle.

    Attributes:
        rotation, shift_px: at the reference's level.
        confidence: posterior probability among the candidates that were refined.
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
        generator: torch.Generator,
    ) -> None:
        self.reference = reference
        self.near = reference.pixels.prefix(radius)
        self.weight = reference.noise.pixel_weight(self.near)
        half = turned_grid(grid, generator)
        self.rotations = with_flips(half)
        self.bank = templates(reference.transform, half, self.near, reference.scale)

    def modes(self, own: ParticleImages, shift_grid_px: Float[Tensor, "t 2"], count: int) -> PoseCandidates:
        """The `count` best separated modes of each particle, over a grid of shifts as well."""
        near = own.prefix(len(self.near))
        posterior = grid_posterior(near.images, near.ctf, self.weight, self.bank, shift_grid_px, self.near, keep=KEEP)
        found = posterior.candidates(self.rotations, shift_grid_px)
        return separated_modes(found, count, SEPARATION_DEG)

    def modes_near(self, own: ParticleImages, shift_px: Float[Tensor, "b 2"], count: int) -> PoseCandidates:
        """The same at each particle's own shift: the images are brought to the centre first."""
        back = shift_ramp(-shift_px, self.near.kx, self.near.ky, self.near.box_size)
        centred = dataclasses.replace(own.prefix(len(self.near)), images=own.images[:, : len(self.near)] * back)
        found = self.modes(centred, shift_px.new_zeros(1, 2), count)
        return dataclasses.replace(found, shift_px=found.shift_px + shift_px[:, None])


def refine_candidates(
    own: ParticleImages,
    candidates: PoseCandidates,
    reference: Reference,
    steps: Sequence[tuple[float, int]],
    *,
    fit_shift: bool,
    prune_fraction: float = PRUNE_FRACTION,
) -> Refined:
    """Refine every candidate at rising radii, so many passes at each, then keep the likeliest at the last one.

    On the way, those far behind their image's best are left: by more than `prune_fraction` of what the best gains over
    an empty image, since one that starts at a grid's point has still some way to go. So are those that have arrived
    where the best is. Two candidates that end within a degree of each other are one: only separate ones share the
    probability.
    """
    count, each = candidates.rotation.shape[:2]
    image = torch.arange(count, device=own.images.device).repeat_interleave(each)
    rotation, shift = candidates.rotation.flatten(0, 1), candidates.shift_px.flatten(0, 1)
    for number, (radius, passes) in enumerate(steps):
        near = reference.pixels.prefix(radius)
        part = own.prefix(len(near))
        part = part if len(image) == count else part.select(image)  # one each: in the images' own order
        found = refine_poses(
            reference.volume, part.images, rotation, shift, part.ctf, reference.noise.pixel_weight(near), near,
            reference.scale, passes=passes, fit_shift=fit_shift,
        )  # fmt: skip
        rotation, shift, cost = found.rotation, found.shift_px, found.cost
        lead = cost.new_full((count,), torch.inf).scatter_reduce_(0, image, cost, "amin")
        if each > 1 and number < len(steps) - 1:
            gain = empty_cost(own.images[:, : len(near)], reference.noise.pixel_weight(near)) - lead
            margin = PRUNE_MARGIN_NATS + prune_fraction * gain.clamp_min(0)
            best = _leaders(cost, lead, image)
            apart = geodesic_angle(rotation, rotation[best[image]]) > SAME / radius
            apart[best] = True
            hopeful = ((cost <= (lead + margin)[image]) & apart).nonzero()[:, 0]  # host sync
            image, rotation, shift = image[hopeful], rotation[hopeful], shift[hopeful]
    best = _leaders(cost, lead, image)
    apart = geodesic_angle(rotation, rotation[best[image]]) > 1.0
    rivals = torch.where(apart, (lead[image] - cost).exp(), torch.zeros_like(cost))
    others = torch.zeros_like(lead).scatter_add_(0, image, rivals)
    return Refined(rotation[best], shift[best], (1 / (1 + others)).float(), lead.float())


def _leaders(cost: Tensor, lead: Tensor, image: Tensor) -> Tensor:
    """Which candidate leads each image; of equals, which are the same pose twice, any."""
    is_leader = (cost == lead[image]).nonzero()[:, 0]  # host sync
    return torch.zeros(len(lead), dtype=torch.long, device=image.device).scatter_(0, image[is_leader], is_leader)


def scatter(first: PoseCandidates, at_first: Tensor, second: PoseCandidates, at_second: Tensor) -> PoseCandidates:
    """Candidates of two groups of particles, put back in the order of all of them."""
    order = torch.cat([at_first, at_second]).argsort()
    return PoseCandidates(
        torch.cat([first.rotation, second.rotation])[order],
        torch.cat([first.shift_px, second.shift_px])[order],
        torch.cat([first.log_weight, second.log_weight])[order],
    )


def join(first: PoseCandidates, second: PoseCandidates) -> PoseCandidates:
    """Candidates of both, side by side."""
    return PoseCandidates(
        torch.cat([first.rotation, second.rotation], 1),
        torch.cat([first.shift_px, second.shift_px], 1),
        torch.cat([first.log_weight, second.log_weight], 1),
    )


def predictions(own: ParticleImages, found: Refined, reference: Reference, count: int) -> tuple[ParticleImages, Tensor]:
    """The first so many particles of a batch, and what the reference predicts for them at the poses found."""
    few, pixels = own.select(torch.arange(min(count, len(own)), device=own.rows.device)), reference.pixels
    predicted = templates(reference.transform, found.rotation[:count], pixels, reference.scale)
    shift = found.shift_px[:count]
    return few, form_images(predicted, few.ctf, shift, pixels.kx, pixels.ky, pixels.box_size)


def likelihood_gain(own: ParticleImages, found: Refined, reference: Reference, radius: float) -> Float[Tensor, " b"]:
    """Log-likelihood ratio of the poses found, refined to that radius, over an empty map."""
    near = reference.pixels.prefix(radius)
    return empty_cost(own.images[:, : len(near)], reference.noise.pixel_weight(near)) - found.cost


def empty_cost(images: Tensor, pixel_weight: Tensor) -> Tensor:
    """Cost of each image, as in `refine_poses`, against an empty map."""
    return 0.5 * (images.abs().square().double() @ pixel_weight.double())


def presence(
    own: ParticleImages, found: Refined, reference: Reference, radius: float, shift_radius_px: float
) -> Float[Tensor, " b"]:
    """Probability that an image shows the particle at all, at even odds beforehand.

    Bayes: exp(gain) over the number of poses that can be told apart at the radius, where the gain is the
    log-likelihood ratio over an empty image. Noise fits one of so many poses by chance, and no better.

    Args:
        radius: Fourier pixels that are compared. A low one: an image's own share in the map would speak for it.
        shift_radius_px: of the disc of possible shifts; 0 where particles are centred.
    """
    near = reference.pixels.prefix(radius)
    part, weight = own.prefix(len(near)), reference.noise.pixel_weight(near)
    cost = evaluate_poses(
        reference.volume, part.images, found.rotation[:, None], found.shift_px[:, None], part.ctf, weight, near,
        reference.scale,
    )[:, 0]  # fmt: skip
    empty = empty_cost(part.images, weight)
    poses = 8 * math.pi**2 * near.radius_limit**3
    if shift_radius_px > 0:
        poses *= max(1.0, math.pi * (shift_radius_px * 2 * math.pi * near.radius_limit / near.box_size) ** 2)
    return torch.sigmoid(empty - cost - math.log(poses)).float()
