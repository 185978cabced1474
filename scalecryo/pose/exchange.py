"""Metropolis steps between poses that a map's symmetry or pseudo-symmetry relates.

Where a map looks the same from several sides, the likeliest of the related poses is the one whose noise agrees best
with what noise has left in the map: each iteration selects for it, and the map of an exact symmetry loses the symmetry.
Drawn with their probabilities, as expectation maximisation asks for, related poses that nothing tells apart are taken
alike, and those that something does tell apart come right.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scalecryo.map.reference import References
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.pose.local_refinement import refine_poses
from scalecryo.pose.related import RelatedPoses

PASSES = 1  # of local refinement, of both poses: the other half's frame is a little turned, and so is the related pose


@dataclass(frozen=True, eq=False)
class RelatedExchange:
    """Offers particles one related pose each.

    Attributes:
        references: of one class; each half is judged by the other's map, since an image's own share in its half's map
            would hold it where it is.
        related: poses that the maps relate.
        radius: Fourier pixels that are compared.
        fit_shift: whether shifts are unknown.
    """

    references: References
    related: RelatedPoses
    radius: float
    fit_shift: bool

    def accepted(
        self,
        images: ParticleImages,
        half: int,
        known: Poses,
        which: Int[Tensor, " b"],
        chance: Float[Tensor, " b"],
    ) -> tuple[Bool[Tensor, " b"], Poses]:
        """Which particles take the related pose, by the likelihood ratio (Metropolis et al. 1953), and that pose.

        Args:
            images: of one half.
            half: which, 1 or 2.
            known: their poses in their half's frame.
            which: of the related poses, from 1; drawn alike for all, so that the way back is as likely.
            chance: drawn from 0 ... 1.
        """
        near, count = images.within(self.radius), len(images)
        side = images.box_size * images.pixel_size
        rotation, shift = self.related.at(which, known.rotation, known.shift / side)
        offered = Poses(rotation, shift * side)
        reference = self.references[0, 3 - half]
        both = torch.arange(count, device=rotation.device).repeat(2)
        part = near.select(both)
        cost = refine_poses(
            reference.packed, part.transforms, torch.cat([known.rotation, rotation]),
            torch.cat([known.shift, offered.shift]) / images.pixel_size, part.ctf,
            reference.noise.pixel_weight(near.pixels), near.pixels, reference.scale,
            passes=PASSES, fit_shift=self.fit_shift,
        ).cost  # fmt: skip
        return chance.log() < cost[:count] - cost[count:], offered
