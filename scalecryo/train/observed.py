"""From a batch of the store to packed Fourier pixels."""

from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch
from scalecryo.physics.ctf import contrast_transfer
from scalecryo.physics.fft import FourierPixels, rfft2_centred
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.train.batches import half_of, particle_inputs


def observe(
    batch: Batch, store: ParticleStore, level: int, pixels: FourierPixels, *, new_halves: bool = False
) -> ParticleImages:
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
    return ParticleImages(batch.rows, half_of(batch, new_halves), pixels.pack(rfft2_centred(batch.images)), ctf)
