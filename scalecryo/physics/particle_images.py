"""A batch of particles at one level of the store: the only record of images that the method knows."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import FourierPixels, rfft2_centred
from scalecryo.physics.grouping import rows_by_group
from scalecryo.physics.poses import Poses


@dataclass(frozen=True, eq=False)
class ParticleImages:
    """Particles with what is known of them. Transforms and CTF values are made when they are first asked for.

    Attributes:
        rows: of the store; -1 for padding.
        half: 1 or 2.
        weight: 1, or 0 for padding.
        optics_group: of the table.
        pixels: Fourier pixels that transforms and CTF values are packed by.
        pixel_size: Å, of the level.
        optics: CTF parameters, or None where the images carry no CTF.
        poses: that came with the particles, or None.
        real: images in real space, protein bright, background at zero mean and unit standard deviation; None once some
            of the particles were selected.
        recorded_on: the micrograph's number; None: not known.
    """

    rows: Int[Tensor, " b"]
    half: Int[Tensor, " b"]
    weight: Float[Tensor, " b"]
    optics_group: Int[Tensor, " b"]
    pixels: FourierPixels
    pixel_size: float
    optics: CtfParameters | None = None
    poses: Poses | None = None
    real: Float[Tensor, "b n n"] | None = None
    recorded_on: Int[Tensor, " b"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def box_size(self) -> int:
        """Of the level, px."""
        return self.pixels.box_size

    @property
    def micrograph(self) -> Int[Tensor, " b"]:
        """Whose images have one scale: the micrograph's number, or where it is not known the optics group's."""
        return self.optics_group if self.recorded_on is None else self.recorded_on

    @cached_property
    def transforms(self) -> Complex[Tensor, "b p"]:
        """Unscaled transforms, packed."""
        assert self.real is not None, "selected particles keep the transforms they had"
        return self.pixels.pack(rfft2_centred(self.real))

    @cached_property
    def ctf(self) -> Float[Tensor, "b p"] | None:
        """CTF values, packed alike; None where the images carry none."""
        if self.optics is None:
            return None
        pixels = self.pixels
        return contrast_transfer(self.optics, pixels.kx, pixels.ky, pixels.box_size, self.pixel_size)

    @cached_property
    def rows_by_half(self) -> tuple[Int[Tensor, " _"], ...]:
        """Places in the batch of the particles of the first half, and of the second."""
        return rows_by_group(self.half - 1, 2)

    def with_transforms(
        self, transforms: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None = None
    ) -> "ParticleImages":
        """The same particles with other images, and where it is given another contrast transfer."""
        return self._with(replace(self, real=None), transforms, self.ctf if ctf is None else ctf)

    def select(self, keep: Tensor) -> "ParticleImages":
        """Some of the particles, by mask or index."""
        made = replace(
            self,
            rows=self.rows[keep],
            half=self.half[keep],
            weight=self.weight[keep],
            optics_group=self.optics_group[keep],
            optics=None if self.optics is None else self.optics.select(keep),
            poses=None if self.poses is None else self.poses.select(keep),
            real=None,
            recorded_on=None if self.recorded_on is None else self.recorded_on[keep],
        )
        return self._with(made, self.transforms[keep], None if self.ctf is None else self.ctf[keep])

    def select_halves(self, first: Int[Tensor, " f"], second: Int[Tensor, " s"]) -> "ParticleImages":
        """Some of the first half and then some of the second, which need not be told apart again."""
        made = self.select(torch.cat([first, second]))
        places = torch.arange(len(made), device=first.device)
        made.__dict__["rows_by_half"] = places[: len(first)], places[len(first) :]
        return made

    def within(self, radius: float) -> "ParticleImages":
        """The same particles up to a lower frequency, Fourier pixels."""
        pixels = self.pixels.prefix(radius)
        ctf = None if self.ctf is None else self.ctf[:, : len(pixels)]
        made = self._with(replace(self, pixels=pixels, real=None), self.transforms[:, : len(pixels)], ctf)
        if "rows_by_half" in self.__dict__:  # the same particles: the device need not be waited for again
            made.__dict__["rows_by_half"] = self.rows_by_half
        return made

    @staticmethod
    def _with(made: "ParticleImages", transforms: Tensor, ctf: Tensor | None) -> "ParticleImages":
        """Fill in what was made before."""
        made.__dict__.update(transforms=transforms, ctf=ctf)
        return made
