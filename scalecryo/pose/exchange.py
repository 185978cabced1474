"""Random steps between poses that a map's symmetry or pseudo-symmetry relates.

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

PASSES = 1  # of local refinement, of all poses: the other half's frame is a little turned, and so are related poses
LOW_RADIUS = 12.0  # Fourier pixels of the first look
MOST = 16  # related poses that a particle is offered at a time


@dataclass(frozen=True, eq=False)
class RelatedExchange:
    """Offers particles related poses.

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

    @property
    def offers(self) -> int:
        """Related poses that a particle is offered at a time."""
        return min(len(self.related) - 1, MOST)

    def accepted(
        self,
        images: ParticleImages,
        half: int,
        known: Poses,
        chance: Float[Tensor, "b m"],
    ) -> tuple[Bool[Tensor, " b"], Poses]:
        """Which particles take a related pose, and that pose: a draw from their probabilities.

        At low frequencies one of all is drawn by its likelihood there, and taken by what higher ones say more (delayed
        acceptance, Christen & Fox 2005): a map that is hardly asymmetric yet becomes so in few iterations.

        Args:
            images: of one half.
            half: which, 1 or 2.
            known: their poses in their half's frame.
            chance: drawn from 0 ... 1: two, and one for each offer.
        """
        which = self._which(chance[:, 2:])
        low = self._cost(images, half, known, which, min(self.radius, LOW_RADIUS))
        share = (low.amin(1, keepdim=True) - low).double().exp().cumsum(1)
        drawn = (share < chance[:, :1] * share[:, -1:]).sum(1).clamp_max(self.offers)
        taken = which.gather(1, drawn[:, None])
        high = self._cost(images, half, known, torch.cat([which[:, :1], taken], 1), self.radius)
        more = (high[:, 0] - high[:, 1]) - (low[:, 0] - low.gather(1, drawn[:, None])[:, 0])
        side = images.box_size * images.pixel_size
        rotation, shift = self.related.at(taken[:, 0], known.rotation, known.shift / side)
        return (drawn > 0) & (chance[:, 1].log() < more), Poses(rotation, shift * side)

    def _which(self, chance: Float[Tensor, "b m"]) -> Int[Tensor, "b m+1"]:
        """Of the related poses the own, and all others or as many at random: alike for all, so that the way back is as
        likely.
        """
        others = len(self.related) - 1
        every = torch.arange(1, others + 1, device=chance.device).expand(len(chance), -1)
        drawn = every if others <= MOST else 1 + (others * chance).long()
        return torch.nn.functional.pad(drawn, (1, 0))

    def _cost(
        self, images: ParticleImages, half: int, known: Poses, which: Int[Tensor, "b m"], radius: float
    ) -> Float[Tensor, "b m"]:
        """Of the images at related poses, each locally refined up to a radius."""
        near, side = images.within(radius), images.box_size * images.pixel_size
        each = torch.arange(len(images), device=which.device).repeat_interleave(which.shape[1])
        rotation, shift = self.related.at(which.flatten(), known.rotation[each], known.shift[each] / side)
        reference, part = self.references[0, 3 - half], near.select(each)
        cost = refine_poses(
            reference.packed, part.transforms, rotation, shift * side / images.pixel_size, part.ctf,
            reference.noise.pixel_weight(near.pixels), near.pixels, reference.scale,
            passes=PASSES, fit_shift=self.fit_shift,
        ).cost  # fmt: skip
        return cost.view(which.shape)
