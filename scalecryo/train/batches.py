"""From the store's batches to the model's inputs."""

import torch

from scalecryo.data.particles import CTF_COLUMNS
from scalecryo.data.store import ParticleStore
from scalecryo.data.stream import Batch
from scalecryo.errors import ConfigError
from scalecryo.model.inputs import ParticleInputs
from scalecryo.physics.ctf import CtfParameters


def stream_columns(store: ParticleStore) -> tuple[str, ...]:
    """The particle columns that the model and the half-maps need."""
    return ("half",) + (CTF_COLUMNS if store.has_ctf else ()) + (("rotation", "shift") if store.has_pose else ())


def training_level(store: ParticleStore, box: int) -> int:
    """The level of the store to train on.

    Raises:
        ConfigError: the store has no such level.
    """
    level = box or store.box_size
    if level not in store.levels:
        raise ConfigError(
            f"config: train.box = {box}: the store {store.url} has levels {', '.join(map(str, store.levels))} px"
        )
    return level


def particle_inputs(batch: Batch, store: ParticleStore, level: int) -> ParticleInputs:
    """The model's inputs for a batch; shifts in Å become pixels of the level."""
    columns = batch.columns
    ctf = CtfParameters(**{name: columns[name] for name in CTF_COLUMNS}) if store.has_ctf else None
    rotation = columns.get("rotation")
    shift = columns.get("shift")
    return ParticleInputs(
        images=batch.images,
        rows=batch.rows.clamp_min(0),  # padding rows are -1, with weight 0
        ctf=ctf,
        rotation=rotation,
        shift_px=None if shift is None else shift / store.level_pixel_size(level),
    )


def half_of(batch: Batch) -> torch.Tensor:
    """The half, 1 or 2, of each particle: as the table says, else by turns along the rows."""
    half = batch.columns["half"].long()
    return torch.where(half > 0, half, 1 + batch.rows % 2)
