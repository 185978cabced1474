"""The guided run: bootstrap, ladder, final poses. Always from nothing, in seconds to minutes.

1. Bootstrap: stochastic expectation maximisation at low resolution, several seeds, two independent halves.
2. Ladder: streamed passes of search, polish and re-insertion at rising radius, each ended by measurement.
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
from scalecryo.errors import CheckpointError
from scalecryo.model.grid_encoder import GridEncoder
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fsc import resolution
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import with_mates
from scalecryo.train.assign import assign_particles
from scalecryo.train.checkpoint import load_checkpoint, save_checkpoint
from scalecryo.train.guided.bootstrap import HALF_GRID
from scalecryo.train.guided.ladder import HalfReferences, Rung, RungPlan, next_radius, plan_rung, references
from scalecryo.train.guided.memory import PoseMemory, load_found, save_found
from scalecryo.train.guided.monitor import GuidedMonitor
from scalecryo.train.guided.poser import ENCODER_RADIUS, GuidedPoser
from scalecryo.train.guided.refine import Reference
from scalecryo.train.guided.start import from_nothing, from_poses, remember_imported
from scalecryo.train.guided.streams import open_stream, search_shifts, stream_steps
from scalecryo.train.guided.teacher import Teacher, lesson_of
from scalecryo.train.observed import observe
from scalecryo.train.resources import memory_mib
from scalecryo.train.run_folder import RunFolder
from scalecryo.train.stopwatch import Stopwatch
from scalecryo.train.world import World

logger = logging.getLogger(__name__)
FIRST_RADIUS = 14.0
FIRST_LESSON = 2
STILL = 0.02  # the search ends when fewer particles than this moved far in a rung
SLOW = 0.6  # of the middle worker's images a second


def train_guided(
    config: Config,
    store: ParticleStore,
    world: World,
    device: torch.device,
    at_checkpoint: Callable[[int], None],
) -> None:
    """Run or resume the guided method and leave a finished run.

    Raises:
        TrainingError: the particles hold no structure that the bootstrap could find.
        CheckpointError: see `load_checkpoint`.
    """
    run = RunFolder(config.run.out)
    state, number, radius, learnt = _restore(run, store, device)
    teacher = _teacher(config, store, world, device)
    if teacher is not None and learnt is not None:
        teacher.load(learnt)
    imported = config.guided.start == "poses"
    memory = _memory(config, store, run, number)
    monitor = GuidedMonitor(config, store, run, start_step=number) if world.leads else None
    watch = world.watch
    try:
        if state is None:
            with watch.part("start"):
                state = (from_poses if imported else from_nothing)(config, store, world, device)
            radius = max(FIRST_RADIUS, _shared_shell(state)) if imported else FIRST_RADIUS
        settled = 0
        while number < config.guided.rungs and settled < config.guided.settled_rungs:
            searching = not imported and number < config.guided.search_rungs and (number < 2 or state.moved > STILL)
            plan = plan_rung(
                min(radius, _limit(config, store)), _levels(config, store), number,
                search=searching, shifted=not config.pose.centred,
            )  # fmt: skip
            before = state
            state, rates = _climb(config, store, memory, plan, state, number, teacher, watch, world, device)
            number += 1
            radius = next_radius(state, plan)
            found = memory.settle(world)
            settled = settled + 1 if _is_settled(before, state) and not searching else 0
            if monitor is not None:
                monitor.after_rung(number, plan, state, memory, rates)
            if world.leads:
                save_found(run, number, found)  # before the checkpoint that counts on it
                save_checkpoint(run, number, _checkpoint(store, state, radius, teacher), config.train.keep_checkpoints)
                run.sync()
            at_checkpoint(number)
    finally:
        if monitor is not None:
            monitor.close()
    if config.train.assign:
        encoder = teacher.encoder if teacher is not None else None
        poser = guided_poser(config, store, state, memory, encoder, device)
        with watch.part("assign"):
            assign_particles(config, store, poser, run, world, device, identity=str(number))
    logger.info("time on worker %d: %s", world.rank, watch.summary())


def guided_poser(
    config: Config,
    store: ParticleStore,
    state: HalfReferences,
    memory: PoseMemory | None,
    encoder: GridEncoder | None,
    device: torch.device,
) -> GuidedPoser:
    """The poser of a run at the end of its ladder."""
    level = state.half_maps[0].shape[-1]
    shifts = search_shifts(config, store, level).to(device)
    return GuidedPoser(config, store, state, memory, encoder, so3_grid(HALF_GRID).to(device), shifts)


def load_guided_poser(
    config: Config, store: ParticleStore, run: RunFolder, device: torch.device, *, same_store: bool
) -> GuidedPoser:
    """The poser of a run's newest checkpoint; on another store nothing is remembered.

    Raises:
        CheckpointError: there is none that can be read, or (with `same_store`) it saw another store.
    """
    state, rungs, _, learnt = _restore(run, store if same_store else None, device)
    if state is None:
        raise CheckpointError(f"{run.url} holds no checkpoint: train it first")
    memory = _memory(config, store, run, rungs) if same_store else None
    teacher = _teacher(config, store, World(), device)
    if teacher is not None and learnt is not None:
        teacher.load(learnt)
    return guided_poser(config, store, state, memory, teacher.encoder if teacher else None, device)


def _memory(config: Config, store: ParticleStore, run: RunFolder, rungs: int) -> PoseMemory:
    """What is known of each particle after so many rungs."""
    memory = PoseMemory(store.count)
    if config.guided.start == "poses":
        remember_imported(store, memory)
    for rung in range(1, rungs + 1):
        memory.remember(load_found(run, rung))
    return memory


def _climb(
    config: Config,
    store: ParticleStore,
    memory: PoseMemory,
    plan: RungPlan,
    state: HalfReferences,
    number: int,
    teacher: Teacher | None,
    watch: Stopwatch,
    world: World,
    device: torch.device,
) -> tuple[HalfReferences, dict[str, float]]:
    """One rung: a pass over the particles, at most `guided.rung_particles` of them; and this worker's rates."""
    start, images, loss = time.monotonic(), 0, None
    rung = Rung(
        plan, state, store.level_pixel_size(plan.level),
        grid=so3_grid(HALF_GRID).to(device),
        shift_grid_px=search_shifts(config, store, plan.level).to(device),
        fit_shift=not config.pose.centred,
        generator=torch.Generator().manual_seed(config.train.seed * 1000 + number),
        watch=watch,
    )  # fmt: skip
    # The first rungs' maps and poses are too coarse to learn from.
    model = _lesson_reference(state, teacher) if teacher is not None and number >= FIRST_LESSON else None
    with open_stream(config, store, plan.level, config.guided.rung_batch, world, number) as stream:
        for _ in range(stream_steps(config, store, plan.level)):
            taken = rung.take(observe(next(stream).to(device), store, plan.level, rung.pixels), memory)
            images += sum(len(own) for own, _ in taken)
            if teacher is not None and model is not None and _everywhere(len(taken) > 0, world, device):
                size = max(1, config.guided.lesson_size // world.size)
                with watch.part("encoder"):
                    for lesson in range(config.guided.lessons):
                        loss = teacher.teach(lesson_of(taken, plan.level, teacher.pixels, size, lesson), model)
        seconds = time.monotonic() - start
        watch.add("read", stream.wait_seconds)
        rates = _rates(images, seconds, stream.wait_seconds, world, device)
        rates |= {f"seconds/{part}": total for part, total in watch.seconds.items()}
    if loss is not None:
        rates["encoder_loss"] = float(loss)  # host sync
    return rung.finish(world), rates


def _rates(images: int, seconds: float, waited: float, world: World, device: torch.device) -> dict[str, float]:
    """Images a second of all workers and of the slowest, the share of time spent waiting for data, memory. Collective.

    A worker far slower than the others is named in the log: all wait for it at the end of each rung.
    """
    own = torch.tensor([[images / seconds, waited / seconds]], dtype=torch.float64)
    every = torch.cat(world.all_gather(own))
    slowest, middle = every[:, 0].min(), every[:, 0].median()
    if world.leads and slowest < SLOW * middle:
        logger.warning("worker %d is slow: %.0f images/s, the middle one %.0f", every[:, 0].argmin(), slowest, middle)
    return {
        "images_per_second": float(every[:, 0].sum()),
        "images_per_second_slowest_worker": float(slowest),
        "data_wait_share": float(every[:, 1].mean()),
        "world_size": world.size,
        **memory_mib(device),
    }


def _everywhere(true: bool, world: World, device: torch.device) -> bool:
    """Whether something holds on every worker: a step that all take together needs all. Collective."""
    if world.size == 1:
        return true
    count = torch.tensor(float(true), device=device)
    world.sum_(count)
    return int(count) == world.size  # host sync


def _teacher(config: Config, store: ParticleStore, world: World, device: torch.device) -> Teacher | None:
    """The encoder and its teacher, at the store's smallest level; None where no lessons are wanted."""
    if config.guided.lessons == 0:
        return None
    level = min(store.levels)
    pixels = fourier_pixels(level, min(level / 2 - 1, ENCODER_RADIUS)).to(device)
    sigma = 0.0 if config.pose.centred else config.guided.shift_radius_a / 2 / store.level_pixel_size(level)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        grid = with_mates(so3_grid(HALF_GRID))
        encoder = GridEncoder(grid, len(pixels), config.guided.encoder_hidden, max(sigma, 0.1)).to(device)
    return Teacher(encoder, pixels, rate=config.guided.encoder_rate, shift_sigma_px=sigma, world=world,
                   seed=config.train.seed + world.rank)  # fmt: skip


def _lesson_reference(state: HalfReferences, teacher: Teacher) -> Reference:
    """The mean of both halves' maps at the encoder's level."""
    mean = (state.half_maps[0] + state.half_maps[1]) / 2
    both = replace(state, half_maps=(mean, mean))
    return references(both, teacher.pixels.box_size, teacher.pixels)[0]


def _restore(
    run: RunFolder, store: ParticleStore | None, device: torch.device
) -> tuple[HalfReferences | None, int, float, dict[str, Any] | None]:
    """State, number of finished rungs, next radius and the encoder's state of the newest checkpoint."""
    saved = load_checkpoint(run, store_hash=store.content_hash if store else None)
    if saved is None:
        return None, 0, FIRST_RADIUS, None
    maps = saved["half_maps"].to(device)
    curve = saved["curve"].to(device)
    state = HalfReferences((maps[0], maps[1]), curve, saved["noise"].to(device), saved["radius"], saved["moved"])
    return state, int(saved["step"]), float(saved["next_radius"]), saved["teacher"]


def _checkpoint(store: ParticleStore, state: HalfReferences, radius: float, teacher: Teacher | None) -> dict[str, Any]:
    return {
        "store_hash": store.content_hash,
        "half_maps": torch.stack(state.half_maps).cpu(),
        "curve": state.curve.cpu(),
        "noise": state.noise.cpu(),
        "radius": state.radius,
        "moved": state.moved,
        "next_radius": radius,
        "teacher": teacher.state() if teacher is not None else None,
    }


def _shared_shell(state: HalfReferences) -> float:
    """Shell at which the halves' correlation falls to 0.5."""
    shell, _ = resolution(state.curve, state.half_maps[0].shape[-1], 1.0, 0.5)
    return shell


def _is_settled(before: HalfReferences, after: HalfReferences) -> bool:
    """Whether a rung at the same level brought the halves no closer: less than half a percent of their correlation."""
    return len(before.curve) == len(after.curve) and float(after.curve.mean()) < 1.005 * float(before.curve.mean())


def _levels(config: Config, store: ParticleStore) -> tuple[int, ...]:
    """The store's levels up to train.box."""
    return tuple(level for level in store.levels if not config.train.box or level <= config.train.box)


def _limit(config: Config, store: ParticleStore) -> float:
    """The largest radius that is ever polished: just inside the largest level's Nyquist."""
    return max(_levels(config, store)) / 2 - 2.0
