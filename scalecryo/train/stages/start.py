"""Where the ladder starts: from nothing, or from the poses that came with the particles."""

import itertools
import logging

import torch
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import sequential
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align_maps import align_maps, apply_alignment
from scalecryo.map.halfmaps import HalfMaps
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import filtered
from scalecryo.physics.mask import mask_from_map
from scalecryo.train.batches import chosen_weight, stream_columns
from scalecryo.train.particle_source import Particles
from scalecryo.train.particle_state import Found, PoseMemory
from scalecryo.train.progress import SavedBootstrap
from scalecryo.train.stages.bootstrap import Bootstrap, FirstMaps
from scalecryo.train.stages.checks import check_contrast, check_count, check_images
from scalecryo.train.stages.refinement import HalfReferences

logger = logging.getLogger(__name__)
NO_SIGNAL_ERRORS = 3.0  # a gain within so many standard errors of nothing is no structure
LEAST_AGREEMENT = 0.5  # mean correlation of the halves over shells 2 to 6, aligned, below which there is none
POSES_LEVEL = 64  # smallest box at which imported poses are put together, where the store has it
POSES_BATCH = 1024


def from_nothing(particles: Particles) -> HalfReferences:
    """Bootstrap at the store's smallest level; the second half-map is turned onto the first."""
    config, store, world, device = particles.config, particles.store, particles.world, particles.device
    check_count(particles.count, config.run.data)
    level = min(store.levels)
    pixels = fourier_pixels(level, min(level / 2 - 1, 14.0)).to(device)
    shifts = particles.shifts(level)
    growing = Bootstrap(pixels, shifts, world, seeds=config.guided.starts, steps=config.guided.bootstrap_steps,
                        seed=config.train.seed)  # fmt: skip
    saved = SavedBootstrap(particles, growing)
    with particles.stream(level, config.guided.bootstrap_batch, epoch=0, skip=saved.load()) as stream:
        batches = particles.observed(stream, level, pixels)
        batch = next(batches)
        check_images(batch, pixels, config.run.data)
        first = growing.run(itertools.chain([batch], batches), saved.after_step)
    maps = torch.stack(first.half_maps)
    if world.is_leader:
        alignment = align_maps(maps[1].cpu(), maps[0].cpu())
        maps[1] = apply_alignment(maps[1].cpu(), alignment).to(device)
        if alignment.mirrored:
            logger.info("bootstrap: the second half had the other hand and was mirrored")
    else:
        maps.zero_()
    world.all_reduce_(maps)  # worker 0's, to all
    _refuse_noise(first, float(fsc(maps[0], maps[1])[2:7].mean()), config)
    check_contrast(maps.mean(0), config.run.data)
    return _references("bootstrap", maps, store, level)


def _refuse_noise(first: FirstMaps, agreement: float, config: Config) -> None:
    """Raise where the maps explain held-out images no better than nothing, or the halves found different things."""
    gain, error = min(zip(first.gain, first.gain_error, strict=True))
    if gain < NO_SIGNAL_ERRORS * error or agreement < LEAST_AGREEMENT:
        raise TrainingError(
            f"{config.run.data}: the bootstrap found no structure: held-out images gain {gain:.2f} ± {error:.2f} in "
            f"log-likelihood over an empty map, and the two halves' maps correlate by {agreement:.2f}: check contrast "
            "sign, pixel size and box, use more particles, or raise guided.bootstrap_steps and guided.starts"
        )


def remember_imported(store: ParticleStore, memory: PoseMemory) -> None:
    """Take the store's poses into the memory, shard by shard.

    Raises:
        TrainingError: the store has none.
    """
    if not store.has_pose:
        raise TrainingError(
            f"{store.url}: guided.start = 'poses' needs poses, and the store has none: convert a table with rotation "
            "angles, or start from 'nothing'"
        )
    for start in range(0, store.count, store.shard_rows):
        stop = min(start + store.shard_rows, store.count)
        columns = store.read_columns(start, stop, ("rotation", "shift"))
        rows = torch.arange(start, stop).numpy()
        memory.remember(Found(rows, columns["rotation"], columns["shift"], torch.ones(len(rows)).numpy()))


def from_poses(particles: Particles) -> HalfReferences:
    """Half-maps put together at the poses that came with the particles, from the training rows. Collective."""
    store, world, device = particles.store, particles.world, particles.device
    fits = [level for level in store.levels if level >= POSES_LEVEL]
    level = min(fits) if fits else max(store.levels)
    pixels = fourier_pixels(level).to(device)
    halves = HalfMaps(level, device=device)
    batches = sequential(
        store, level, rank=world.rank, world_size=world.size, batch_size=POSES_BATCH, columns=stream_columns(store),
        rows_limit=particles.rows, device=device,
    )  # fmt: skip
    for batch in batches:
        own = particles.observe(batch, level, pixels)
        shift = batch.columns["shift"] / store.level_pixel_size(level)
        weight = chosen_weight(particles.subset, batch.rows)
        halves.add(filtered(own.images, own.ctf), batch.columns["rotation"], shift, weight, own.half, pixels)
    if world.size > 1:
        halves.reduce(world.all_reduce_, pixels.radius_limit)
    maps = torch.stack(halves.solve(store.level_pixel_size(level)).half_maps)
    check_contrast(maps.mean(0), store.url)
    return _references("imported poses", maps, store, level)


def _references(what: str, maps: Tensor, store: ParticleStore, level: int) -> HalfReferences:
    """The state of a ladder before its first iteration."""
    mask = mask_from_map(maps.mean(0), store.level_pixel_size(level))
    curve = fsc(maps[0] * mask, maps[1] * mask).float()
    state = HalfReferences((maps[0], maps[1]), curve, torch.ones(level // 2 + 1, device=maps.device), 12.0)
    angstrom = store.level_pixel_size(level) * level / state.shared_shell
    logger.info("%s: the halves agree to shell %.1f, %.1f Å", what, state.shared_shell, angstrom)
    return state
