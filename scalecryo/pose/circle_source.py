"""Candidates of the auto-encoder's encoder: what its heads say of an image's copies, compared with a reference."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalecryo.map.reference import Reference
from scalecryo.model.circle_encoder import Candidates, CircleEncoder, CircleTransform
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses, concatenated
from scalecryo.pose.local_refinement import evaluate_poses
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.related import RelatedPoses

SEPARATION_DEG = 12.0  # nearer candidates are locally refined to the same pose


@dataclass(frozen=True, eq=False)
class CircleSource:
    """The best separated candidates of each image; the known pose is not looked at.

    Attributes:
        encoder: image circles to poses.
        circles: images to circles.
        radius: Fourier pixels by which candidates are compared with the reference.
        count: candidates kept of each image.
        related: each candidate is offered at all related poses.
    """

    encoder: CircleEncoder
    circles: CircleTransform
    radius: float
    count: int
    related: RelatedPoses

    @torch.no_grad()
    def candidates(
        self, images: ParticleImages, reference: Reference, known: Poses, seen: Bool[Tensor, " b"]
    ) -> PoseCandidates:
        """See `CandidateSource`."""
        found, _ = self.encoder.candidates(encoder_input(images, self.circles))
        near = images.within(min(self.radius, images.pixels.radius_limit))
        weight = reference.noise.pixel_weight(near.pixels)
        cost = evaluate_poses(
            reference.packed, near.transforms, found.rotation, found.shift * images.box_size, near.ctf, weight,
            near.pixels, reference.scale,
        )  # fmt: skip
        box = images.box_size * images.pixel_size
        modes = separated_modes(
            PoseCandidates(found.rotation, found.shift * box, -cost.float()), self.count, SEPARATION_DEG
        )
        rotation, shift = self.related.all(modes.rotation, modes.shift / box)
        turned = [replace(modes, rotation=r, shift=t * box) for r, t in zip(rotation, shift, strict=True)]
        return concatenated(turned, 1)

    @torch.no_grad()
    def own_poses(self, images: ParticleImages) -> Poses:
        """The pose with the highest learnt score: one forward pass, no map."""
        found, hidden = self.encoder.candidates(encoder_input(images, self.circles))
        return best_poses(found, self.encoder.scores(hidden).argmax(1), images)


def best_poses(found: Candidates, best: Tensor, images: ParticleImages) -> Poses:
    """One candidate of each image, its shift in Å."""
    row = torch.arange(len(best), device=best.device)
    return Poses(found.rotation[row, best], found.shift[row, best] * (images.box_size * images.pixel_size))


def encoder_input(images: ParticleImages, circles: CircleTransform) -> Float[Tensor, "b c a"]:
    """Circles of the images times their CTFs; levels keep the noise, so they are alike at every one."""
    near = images.within(min(circles.pixels.radius_limit, images.pixels.radius_limit))
    values = near.transforms if near.ctf is None else near.transforms * near.ctf
    return circles(values / images.box_size)
