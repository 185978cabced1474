"""The last pass of the auto-encoder: poses by its own pose source."""

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput
from scalecryo.train.batches import particle_inputs
from scalecryo.train.posed import Posed
from scalecryo.train.stages.final_pass import correlation, pictures_of


class ModelPoser:
    """Poses by the auto-encoder's own pose source: encoder, table or known."""

    def __init__(self, config: Config, store: ParticleStore, model: AutoEncoder) -> None:
        self.level = model.volume.box_size
        self._store = store
        self._model = model
        # A pose table knows only the rows that it was trained on.
        limited = config.pose.source == "table" and config.train.rows
        self._posed_rows = config.train.rows if limited else store.count

    def pose(self, batch: Batch, *, pictures: bool) -> Posed:
        """One forward pass."""
        usable = (batch.rows < self._posed_rows).float()
        batch.rows.clamp_(max=self._posed_rows - 1)
        output: AutoEncoderOutput = self._model(particle_inputs(batch, self._store, self.level))
        pixels = self._model.pixels(batch.images.device)
        shown = pictures_of(output.observed, output.predicted, pixels) if pictures else None
        confidence = usable * correlation(output.observed, output.predicted, pixels.weight)
        shift = output.shift_px * self._store.level_pixel_size(self.level)
        return Posed(output.rotation, shift, confidence, usable, shown)
