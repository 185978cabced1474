"""The guided run: bootstrap, ladder, final poses. Always from nothing, in seconds to minutes.

1. Bootstrap: stochastic expectation maximisation at low resolution, several seeds, two independent halves.
2. Ladder: streamed passes of search, local refinement and re-insertion at rising radius, each ended by measurement.
3. Assign: one pass poses every particle and writes the maps.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import StreamMetrics
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError
from scalecryo.model.grid_encoder import GridEncoder
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.estimator import Reference
from scalecryo.pose.search import with_flips
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.resources import memory_mib
from scalecryo.train.batches import data_hash
from scalecryo.train.encoder_training import EncoderTrainer, training_batch
from scalecryo.train.guided_monitor import GuidedMonitor, Rates
from scalecryo.train.particle_source import Particles
from scalecryo.train.particle_state import PoseMemory, load_found, save_found
from scalecryo.train.progress import Progress, is_settled, load_progress, save_progress
from scalecryo.train.stages.bootstrap import HALF_GRID
from scalecryo.train.stages.final_pass import assign_particles
from scalecryo.train.stages.guided_poser import ENCODER_RADIUS, GuidedPoser
from scalecryo.train.stages.refinement import (
    HalfReferences,
    Iteration,
    IterationPlan,
    next_radius,
    plan_iteration,
    references,
)
from scalecryo.train.stages.start import from_nothing, from_poses, remember_imported

logger = logging.getLogger(__name__)
FIRST_RADIUS = 14.0
FIRST_ENCODER_ITERATION = 2
STILL = 0.02  # the search ends when fewer particles than this moved far in an iteration
SLOW = 0.6  # of the middle worker's images a second


def train_guided(
    config: Config,
    store: ParticleStore,
    run: RunFolder,
    world: World,
    device: torch.device,
    at_checkpoint: Callable[[int], None],
) -> None:
    """Run or resume the guided method and leave a finished run.

    Raises:
        TrainingError: the particles hold no structure that the bootstrap could find.
        CheckpointError: see `load_checkpoint`.
    """
    particles = Particles.of(config, store, world, device)
    chosen = data_hash(store, particles.subset)
    progress, learnt = load_progress(run, chosen, device)
    iterations = progress.iterations if progress else 0
    teacher = _teacher(particles, learnt)
    memory = _memory(config, store, run, iterations)
    monitor = GuidedMonitor(config, store, run, start_step=iterations) if world.is_leader else None
    try:
        progress = progress or _start(particles)
        while progress.iterations < config.guided.iterations and progress.settled < config.guided.settled_iterations:
            plan = _plan(particles, progress)
            progress, iteration, rates = _climb(particles, memory, plan, progress, teacher)
            found = memory.settle(world)
            if monitor is not None:
                monitor.after_iteration(progress.iterations, iteration, progress.state, memory, rates)
            if world.is_leader:
                # Before the checkpoint, which counts on both.
                save_found(run, progress.iterations, found)
                run.sync()
                taught = teacher.state() if teacher is not None else None
                save_progress(run, progress, taught, chosen, config.train.keep_checkpoints)
            at_checkpoint(progress.iterations)
    finally:
        if monitor is not None:
            monitor.close()
    if config.train.final_pass:
        poser = GuidedPoser(particles, progress.state, memory, teacher.encoder if teacher else None)
        identity = f"{chosen}-{progress.iterations}"
        with world.timer.part("assign"):
            assign_particles(config, store, poser, run, world, device, identity=identity, subset=particles.subset)
    logger.info("time on worker %d: %s", world.rank, world.timer.summary())


def load_guided_poser(
    config: Config, store: ParticleStore, run: RunFolder, device: torch.device, *, same_store: bool
) -> GuidedPoser:
    """The poser of a run's newest checkpoint; on another store nothing is remembered.

    Raises:
        CheckpointError: there is none that can be read, or (with `same_store`) it saw another store.
    """
    particles = Particles.of(config, store, World(), device)
    chosen = data_hash(store, particles.subset) if same_store else None
    progress, learnt = load_progress(run, chosen, device)
    if progress is None:
        raise CheckpointError(f"{run.url} holds no checkpoint: train it first")
    memory = _memory(config, store, run, progress.iterations) if same_store else None
    teacher = _teacher(particles, learnt)
    return GuidedPoser(particles, progress.state, memory, teacher.encoder if teacher else None)


def _memory(config: Config, store: ParticleStore, run: RunFolder, iterations: int) -> PoseMemory:
    """What is known of each particle after so many iterations."""
    memory = PoseMemory(store.count)
    if config.guided.start == "poses":
        remember_imported(store, memory)
    for iteration in range(1, iterations + 1):
        memory.remember(load_found(run, iteration))
    return memory


def _start(particles: Particles) -> Progress:
    """Before the first iteration."""
    imported = particles.config.guided.start == "poses"
    with particles.world.timer.part("start"):
        state = (from_poses if imported else from_nothing)(particles)
    return Progress(state, 0, max(FIRST_RADIUS, state.shared_shell) if imported else FIRST_RADIUS, 0)


def _plan(particles: Particles, progress: Progress) -> IterationPlan:
    """The next iteration; it searches while particles still jump, unless they came with poses."""
    config, number = particles.config, progress.iterations
    jumping = number < 2 or progress.state.moved > STILL
    searching = config.guided.start == "nothing" and number < config.guided.search_iterations and jumping
    radius = min(progress.radius, particles.largest_radius)
    return plan_iteration(radius, particles.levels, number, search=searching, shifted=particles.fit_shift)


def _climb(
    particles: Particles, memory: PoseMemory, plan: IterationPlan, progress: Progress, teacher: EncoderTrainer | None
) -> tuple[Progress, Iteration, Rates]:
    """One iteration: a pass over the particles, at most `guided.iteration_particles` of them; and what to tell of
    it."""
    config, world, device = particles.config, particles.world, particles.device
    timer, number, before = world.timer, progress.iterations, progress.state
    start, images, loss = time.monotonic(), 0, None
    iteration = Iteration(
        plan, before, particles.store.level_pixel_size(plan.level),
        grid=so3_grid(HALF_GRID).to(device),
        shift_grid_px=particles.shifts(plan.level),
        fit_shift=particles.fit_shift,
        generator=torch.Generator().manual_seed(config.train.seed * 1000 + number),
        timer=timer,
    )  # fmt: skip
    # The first iterations' maps and poses are too coarse to learn from.
    model = _encoder_reference(before, teacher) if teacher is not None and number >= FIRST_ENCODER_ITERATION else None
    if teacher is not None:
        teacher.begin(number)
    with particles.stream(plan.level, config.guided.batch_size, epoch=number) as stream:
        for _ in range(particles.iteration_steps(plan.level)):
            taken = iteration.take(particles.observe(next(stream), plan.level, iteration.pixels), memory)
            images += sum(len(own) for own, _ in taken)
            if teacher is not None and model is not None and _everywhere(len(taken) > 0, world, device):
                size = max(1, config.guided.encoder_batch // world.size)
                with timer.part("encoder"):
                    for lesson in range(config.guided.encoder_steps):
                        loss = teacher.teach(training_batch(taken, plan.level, teacher.pixels, size, lesson), model)
        timer.add("read", stream.wait_seconds)
        rates = _rates(images, time.monotonic() - start, stream.metrics, world, device)
    if loss is not None:
        rates.scalars["encoder_loss"] = float(loss)  # host sync
    after = iteration.finish(world)
    still = plan.modes == 0 and is_settled(before, after)
    settled = progress.settled + 1 if still else 0
    return Progress(after, number + 1, next_radius(after, plan), settled), iteration, rates


def _rates(images: int, seconds: float, stream: StreamMetrics, world: World, device: torch.device) -> Rates:
    """Images a second of all workers and of the slowest, waits, requests, memory, seconds by part. Collective.

    A worker far slower than the others is named in the log: all wait for it at the end of each iteration.
    """
    own = torch.tensor(
        [[images / seconds, stream.wait_seconds / seconds, stream.retries, stream.bytes_read]], dtype=torch.float64
    )
    every = torch.cat(world.all_gather(own))
    slowest, middle = every[:, 0].min(), every[:, 0].median()
    if world.is_leader and slowest < SLOW * middle:
        logger.warning("worker %d is slow: %.0f images/s, the middle one %.0f", every[:, 0].argmin(), slowest, middle)
    scalars = {
        "images_per_second": float(every[:, 0].sum()),
        "images_per_second_slowest_worker": float(slowest),
        "data_wait_share": float(every[:, 1].mean()),
        "stream/retries": float(every[:, 2].sum()),
        "stream/mib_read": float(every[:, 3].sum()) / 2**20,
        "world_size": world.size,
        "reduce/mib_so_far": world.timer.reduced_bytes / 2**20,
        **{f"seconds/{part}": total for part, total in world.timer.seconds.items()},
        **memory_mib(device),
    }
    return Rates(scalars, every[:, 0])


def _everywhere(true: bool, world: World, device: torch.device) -> bool:
    """Whether something holds on every worker: a step that all take together needs all. Collective."""
    if world.size == 1:
        return true
    count = torch.tensor(float(true), device=device)
    world.all_reduce_(count)
    return int(count) == world.size  # host sync


def _teacher(particles: Particles, learnt: dict[str, Any] | None) -> EncoderTrainer | None:
    """The encoder and its teacher, at the store's smallest level; None where no lessons are wanted."""
    config, store, world = particles.config, particles.store, particles.world
    if config.guided.encoder_steps == 0:
        return None
    level = min(store.levels)
    pixels = fourier_pixels(level, min(level / 2 - 1, ENCODER_RADIUS)).to(particles.device)
    sigma = config.guided.shift_radius_a / 2 / store.level_pixel_size(level) if particles.fit_shift else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        grid = with_flips(so3_grid(HALF_GRID))
        encoder = GridEncoder(grid, len(pixels), config.guided.encoder_hidden, max(sigma, 0.1)).to(particles.device)
    teacher = EncoderTrainer(encoder, pixels, rate=config.guided.encoder_rate, shift_sigma_px=sigma, world=world,
                      reduce_dtype=config.optim.reduce_dtype, seed=config.train.seed + world.rank)  # fmt: skip
    if learnt is not None:
        teacher.load(learnt)
    return teacher


def _encoder_reference(state: HalfReferences, teacher: EncoderTrainer) -> Reference:
    """The mean of both halves' maps at the encoder's level."""
    mean = (state.half_maps[0] + state.half_maps[1]) / 2
    both = replace(state, half_maps=(mean, mean))
    return references(both, teacher.pixels.box_size, teacher.pixels)[0]
