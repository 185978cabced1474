"""From the configuration to the store's batches, and from those to the model's inputs."""

import numpy as np
import torch

from scalecryo.config import Config
from scalecryo.data.io.retry import RetryPolicy
from scalecryo.data.particles import CTF_COLUMNS
from scalecryo.data.selection.subset import Subset
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import Batch, ParticleStream
from scalecryo.distributed.world import World
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


def order_of(
    config: Config, store: ParticleStore, level: int, batch_size: int, subset: Subset | None = None
) -> BatchOrder:
    """The order of batches over the training rows: a pure function of the configuration, the store and the subset.

    Args:
        batch_size: particles in a global batch.
        subset: `data.subset.choose(config.train, store)`, made once in a run.
    """
    return BatchOrder(
        count=min(config.train.rows or store.count, store.count),
        block_rows=store.block_rows(level),
        batch_size=batch_size,
        seed=config.train.seed,
        max_lanes=config.stream.lanes,
        window_blocks=config.stream.window_blocks,
        subset=subset,
    )


def data_hash(store: ParticleStore, subset: Subset | None) -> str:
    """What was trained on: the store, and which of its particles."""
    return store.content_hash if subset is None else f"{store.content_hash}:{subset.digest}"


def stream_of(
    config: Config, store: ParticleStore, level: int, order: BatchOrder, world: World, start_step: int,
    device: torch.device,
) -> ParticleStream:  # fmt: skip
    """This worker's stream of batches at a level, on its device, from a global step on."""
    return ParticleStream(
        store, level, order, rank=world.rank, world_size=world.size, start_step=start_step,
        columns=stream_columns(store), threads=config.stream.threads, device=device,
        prefetch_bytes=config.stream.prefetch_mib << 20, patience=RetryPolicy(seconds=config.stream.retry_seconds),
    )  # fmt: skip


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


def chosen_weight(subset: Subset | None, rows: torch.Tensor) -> torch.Tensor:
    """1 for the rows that a subset holds, else 0."""
    if subset is None:
        return torch.ones(len(rows), device=rows.device)
    at = rows.cpu().numpy()  # host sync
    inside = at < subset.store_rows
    chosen = inside & subset.contains(np.where(inside, at, 0))
    return torch.from_numpy(chosen).to(rows.device, torch.float32)


def half_of(batch: Batch, anew: bool = False) -> torch.Tensor:
    """The half, 1 or 2, of each particle: as the table says, else by turns along the rows.

    Args:
        anew: new halves, which do not depend on the table's: for a run on one of them (`train.half`).
    """
    if anew:
        return 1 + ((batch.rows * 2654435761) >> 16) % 2  # Knuth's multiplicative hash: no pattern along the rows
    half = batch.columns["half"].long()
    return torch.where(half > 0, half, 1 + batch.rows % 2)
