"""How the guided method reads the store: endless batches in an order of its own for each rung, and shifts to try."""

from collections.abc import Iterator

import torch
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import ParticleStream
from scalecryo.physics.fft import FourierPixels
from scalecryo.pose.search import shift_grid
from scalecryo.train.batches import stream_columns
from scalecryo.train.observed import Observed, observe
from scalecryo.train.world import World


def search_shifts(config: Config, store: ParticleStore, level: int) -> Tensor:
    """Shift hypotheses in px of a level: none when particles are centred, else a disc with a step of about 1.5 px."""
    if config.pose.centred:
        return torch.zeros(1, 2)
    radius = config.guided.shift_radius_a / store.level_pixel_size(level)
    return shift_grid(radius, min(1.5, max(radius / 2, 0.5)))


def open_stream(
    config: Config, store: ParticleStore, level: int, batch_size: int, world: World, epoch: int
) -> ParticleStream:
    """A stream of batches at a level, started at an epoch of its own."""
    order = stream_order(config, store, level, batch_size)
    return ParticleStream(
        store, level, order, rank=world.rank, world_size=world.size, start_step=epoch * order.steps_per_epoch,
        columns=stream_columns(store), threads=config.stream.threads,
    )  # fmt: skip


def stream_order(config: Config, store: ParticleStore, level: int, batch_size: int) -> BatchOrder:
    """The order of a pass at a level over the training rows."""
    return BatchOrder(
        count=min(config.train.rows or store.count, store.count),
        block_rows=store.block_rows(level),
        batch_size=batch_size,
        seed=config.train.seed,
        max_lanes=config.stream.lanes,
        window_blocks=config.stream.window_blocks,
    )


def stream_steps(config: Config, store: ParticleStore, level: int) -> int:
    """Batches of a rung: one pass, or as many as hold `guided.rung_particles`."""
    steps = stream_order(config, store, level, config.guided.rung_batch).steps_per_epoch
    return min(steps, -(-config.guided.rung_particles // config.guided.rung_batch))


def observed_batches(
    stream: ParticleStream, store: ParticleStore, level: int, pixels: FourierPixels
) -> Iterator[Observed]:
    """A stream's batches as transforms at some Fourier pixels, on the pixels' device."""
    for batch in stream:
        yield observe(batch.to(pixels.kx.device), store, level, pixels)
