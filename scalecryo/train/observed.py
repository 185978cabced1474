"""Particles as the search, the polish and the insertion see them: packed Fourier pixels, CTF, half."""

from dataclasses import dataclass

from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch
from scalecryo.physics.ctf import contrast_transfer
from scalecryo.physics.fft import FourierPixels, rfft2_centred
from scalecryo.train.batches import half_of, particle_inputs


@dataclass(frozen=True)
class Observed:
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

    def select(self, keep: Tensor) -> "Observed":
        """Some of the particles, by mask or index."""
        return Observed(
            self.rows[keep], self.half[keep], self.images[keep], None if self.ctf is None else self.ctf[keep]
        )

    def prefix(self, count: int) -> "Observed":
        """The same particles up to a lower frequency: the first `count` pixels."""
        return Observed(self.rows, self.half, self.images[:, :count], None if self.ctf is None else self.ctf[:, :count])


def observe(
    batch: Batch, store: ParticleStore, level: int, pixels: FourierPixels, *, new_halves: bool = False
) -> Observed:
    """Transform and pack a batch's images; padding rows are dropped. `new_halves`: not the table's, see `half_of`."""
    present = batch.weight > 0
    if not bool(present.all()):  # host sync: the ragged end of an epoch
        batch = Batch(
            batch.rows[present],
            batch.images[present],
            batch.weight[present],
            {name: values[present] for name, values in batch.columns.items()},
        )
    inputs = particle_inputs(batch, store, level)
    ctf = None
    if inputs.ctf is not None:
        ctf = contrast_transfer(inputs.ctf, pixels.kx, pixels.ky, level, store.level_pixel_size(level))
    return Observed(batch.rows, half_of(batch, new_halves), pixels.pack(rfft2_centred(batch.images)), ctf)
