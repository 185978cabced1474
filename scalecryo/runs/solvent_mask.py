"""The mask and the diameter that the settings give, read and checked against the store."""

import numpy as np
import torch

from scalecryo.config import TrainConfig
from scalecryo.data.formats import mrc
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError, InputError
from scalecryo.map.solvent import SolventMask

ROUNDING = 1e-3  # by which values of a soft mask may leave 0 to 1, and, relative, an extent the box's
LEAST_VOXELS = 8  # that a mask must hold


def load_solvent_mask(settings: TrainConfig, store: ParticleStore) -> SolventMask | None:
    """Read train.mask and train.diameter_a; None where neither is set.

    Raises:
        ConfigError: the diameter is larger than the box.
        MissingInputError: there is no such file.
        InputError: the mask is no cube of an even box over the extent of the store's particles, or no soft mask.
    """
    if not settings.mask and not settings.diameter_a:
        return None
    extent = store.box_size * store.pixel_size
    if settings.diameter_a > extent:
        raise ConfigError(
            f"config: train.diameter_a = {settings.diameter_a:g}: the box of {store.url} is {extent:g} Å "
            f"({store.box_size} px of {store.pixel_size:g} Å): give the particle's diameter in Å"
        )
    volume = _checked(settings.mask, store) if settings.mask else None
    return SolventMask(volume, settings.diameter_a)


def _checked(url: str, store: ParticleStore) -> torch.Tensor:
    """The mask at the file's own box."""
    volume, pixel_size, _ = mrc.read_map(url)
    box_size = volume.shape[-1]
    wanted = f"{store.url} has {store.box_size} px of {store.pixel_size:g} Å"
    if len(set(volume.shape)) > 1 or box_size % 2:
        shape = " × ".join(map(str, volume.shape))
        raise InputError(f"mask {url}: its box of {shape} px is no even cube: {wanted}; make the mask from a run's map")
    extent = store.box_size * store.pixel_size
    if abs(box_size * pixel_size - extent) > ROUNDING * extent + 1e-4 * box_size:
        raise InputError(
            f"mask {url}: {box_size} px of {pixel_size:g} Å, but {wanted}: both must span the same length; resample or "
            "pad the mask, or set the pixel size in its header"
        )
    low, high = float(volume.min()), float(volume.max())
    if not np.isfinite(volume).all() or low < -ROUNDING or high > 1 + ROUNDING:
        raise InputError(f"mask {url}: values from {low:g} to {high:g}: a soft mask lies between 0 and 1; scale it")
    inside = int((volume > 0.5).sum())
    if inside < LEAST_VOXELS:
        raise InputError(f"mask {url}: {inside} voxels above 0.5: the particle must lie where the mask is 1")
    return torch.from_numpy(volume).clamp(0, 1)
