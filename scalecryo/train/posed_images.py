"""Images at the poses that were found, as the linear model of variety looks at them."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates


@dataclass(frozen=True, eq=False)
class PosedImages:
    """Images at their final poses, moved back to the centre.

    Attributes:
        images: whose transforms these are, with the common noise.
        poses: of each.
        centred: transforms with the shift undone.
        ctf: contrast transfer, ones where there is none.
        weight: of each in sums.
    """

    images: ParticleImages
    poses: PoseEstimates
    centred: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"]
    weight: Float[Tensor, " b"]

    @property
    def half(self) -> Int[Tensor, " b"]:
        """1 or 2."""
        return self.images.half

    @property
    def rotation(self) -> Float[Tensor, "b 3 3"]:
        """Image frame to volume frame."""
        return self.poses.rotation

    @classmethod
    def of(cls, images: ParticleImages, poses: PoseEstimates, weight: Float[Tensor, " b"]) -> "PosedImages":
        """Images at poses, each with its weight."""
        ctf = torch.ones_like(images.transforms.real) if images.ctf is None else images.ctf
        return cls(images, poses, _centred(images, poses), ctf, weight)

    def at(self, rotation: Float[Tensor, "b 3 3"], shift: Float[Tensor, "b 2"]) -> "PosedImages":
        """The same images at other poses; shift in Å."""
        poses, images = replace(self.poses, rotation=rotation, shift=shift), self.images
        return replace(self, poses=poses, centred=_centred(images, poses))

    def where(self, other: "PosedImages", at: Bool[Tensor, " b"]) -> "PosedImages":
        """The same images at another record's poses where `at` is true."""
        rotation = torch.where(at[:, None, None], other.rotation, self.rotation)
        shift = torch.where(at[:, None], other.poses.shift, self.poses.shift)
        centred = torch.where(at[:, None], other.centred, self.centred)
        return replace(self, poses=replace(self.poses, rotation=rotation, shift=shift), centred=centred)


def _centred(images: ParticleImages, poses: PoseEstimates) -> Complex[Tensor, "b p"]:
    """Transforms with the shift undone."""
    pixels = images.pixels
    ramp = shift_ramp(-poses.shift_px(images.pixel_size), pixels.kx, pixels.ky, pixels.box_size)
    return images.transforms * ramp
