"""Particles as search, local refinement and insertion see them: packed Fourier pixels, CTF, half."""

from dataclasses import dataclass

from jaxtyping import Complex, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ParticleImages:
    """A batch of particles at one level, in Fourier space.

    Attributes:
        rows: of the store.
        half: 1 or 2.
        images: transforms, packed.
        ctf: packed alike, or None where the images carry none.
    """

    rows: Int[Tensor, " b"]
    half: Int[Tensor, " b"]
    images: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor) -> "ParticleImages":
        """Some of the particles, by mask or index."""
        return ParticleImages(
            self.rows[keep], self.half[keep], self.images[keep], None if self.ctf is None else self.ctf[keep]
        )

    def prefix(self, count: int) -> "ParticleImages":
        """The same particles up to a lower frequency: the first `count` pixels."""
        return ParticleImages(
            self.rows, self.half, self.images[:, :count], None if self.ctf is None else self.ctf[:, :count]
        )
