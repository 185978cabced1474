"""The training loop, the only one: the stages of a recipe, one after the other, for one process and for many."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.throughput import Throughput
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError, ScalecryoError, Stopped, TrainingError
from scalecryo.map.reference import ReferenceSet
from scalecryo.runs.checkpoint import Checkpoint, load_checkpoint, note_end, note_start, save_checkpoint
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.log import LiveLine
from scalecryo.runs.monitor import PassReport, RunMonitor
from scalecryo.runs.paused import remove_pause
from scalecryo.train.forecast import Forecast, parts_of
from scalecryo.train.particle_source import ParticleReader, RunContext
from scalecryo.train.progress import RunProgress
from scalecryo.train.recipes import stages_of
from scalecryo.train.requirements import check_particles
from scalecryo.train.stage import Learned, Stage
from scalecryo.train.stopping import Notice, Stopping

AtCheckpoint = Callable[[int], None]
Publish = Callable[[Mapping[str, float]], None]
logger = logging.getLogger(__name__)
BATCH_SETTING = {"guided": "guided.batch_size", "poses": "guided.batch_size", "autoencoder": "autoencoder.batch_size"}


def train(
    config: Config,
    world: World,
    device: torch.device,
    *,
    at_checkpoint: AtCheckpoint = lambda step: None,
    publish: Publish = lambda figures: None,
    line: LiveLine | None = None,
    notice: Notice | None = None,
) -> None:
    """Train a run from its newest checkpoint, or from its start where it has none; then pose every particle.

    Args:
        config: everything that determines the run.
        world: this worker's place; with more than one, a process group is already up.
        device: where the tensors live.
        at_checkpoint: called by every worker with the step, after each checkpoint past the start.
        publish: called by worker 0 with the figures of each pass, by their names in `runs.exported`.
        line: of the terminal, that says how far the run is.
        notice: that tells this worker to end; one that is told is enough.

    Raises:
        TrainingError: the particles lack what the configuration needs, or the loss stops being a number.
        CheckpointError: see `load_checkpoint`.
        Stopped: it was told to end.
    """
    store = ParticleStore.open(config.run.data)
    check_particles(config, store)
    run = RunFolder(config.run.out)
    context = RunContext.of(config, store, run, world, device)
    monitor: RunMonitor | None = None
    progress: RunProgress | None = None
    try:
        stages, _ = stages_of(context)
        checkpoint = load_checkpoint(
            run, store_hash=context.data_hash, recipe=context.config.recipe, grown_from=store.grown_from
        )
        stopping = Stopping(context, notice, step=0 if checkpoint is None else checkpoint.step)
        if world.is_leader:
            note_start(run)
            monitor = RunMonitor(config, store, run, start_step=stopping.reached, publish=publish)
            progress = _progress(context, line, resumed=checkpoint is not None)
        run_stages(_remaining(stages, checkpoint), context, monitor, at_checkpoint, progress, stopping)
        logger.info("time on worker %d: %s", world.rank, world.timer.summary())
        if world.is_leader:
            run.sync()
            note_end(run, config, context.data_hash)
    except (ScalecryoError, torch.OutOfMemoryError) as error:
        refused = error if isinstance(error, ScalecryoError) else _out_of_memory(error, context)
        if monitor is not None and not isinstance(refused, Stopped):
            monitor.failed(refused)
        if refused is error:
            raise
        raise refused from error
    finally:
        if line is not None:
            line.hide()
        if monitor is not None:
            monitor.close()
        run.close()


def run_stages(
    stages: Sequence[Stage],
    context: RunContext,
    monitor: RunMonitor | None = None,
    at_checkpoint: AtCheckpoint = lambda step: None,
    progress: RunProgress | None = None,
    stopping: Stopping | None = None,
) -> None:
    """Run stages until each is done. Collective.

    Args:
        stages: in order; the first may stand at a checkpoint.
        context: of the run.
        monitor: gets the reports, on worker 0.
        at_checkpoint: see `train`.
        progress: is told of every batch, on worker 0.
        stopping: whether and where to end before all is done; None: nowhere.

    Raises:
        Stopped: the run was told to end.
    """
    world, reader, throughput = context.world, ParticleReader(context), Throughput(context.world, context.device)
    stopping = stopping or Stopping(context)
    try:
        for stage in stages:
            if progress is not None:
                progress.begin_stage(stage.name)
            while not stage.done():
                waited, batches = reader.metrics.wait_seconds, 0
                throughput.begin()
                request = stopping.request(stage)
                if progress is not None:
                    progress.begin_pass(reader.count(request))
                for images in reader.batches(request):
                    stage.step(*images)
                    batches += 1
                    if progress is not None:
                        progress.batch(len(images[0]))
                    stopping.after_batch(stage)
                for _ in range(batches, reader.most(request)):  # others have more
                    stopping.after_batch(stage)
                metrics = reader.metrics
                wait = metrics.wait_seconds - waited
                world.timer.add("read", wait)
                report = stage.finish_pass(world)
                rates, speed = throughput.measure(report.images, batches, wait, metrics.retries, metrics.bytes_read)
                left = "" if progress is None else progress.end_pass(report.progress, done=stage.done())
                if monitor is not None:
                    monitor.after_pass(report, rates, speed, left)
                stopping.after_pass(report.step if report.checkpoint else None)
                if report.checkpoint:
                    _save(stage, context, report)
                    if report.step:
                        at_checkpoint(report.step)
    finally:
        reader.close()


def _progress(context: RunContext, line: LiveLine | None, *, resumed: bool) -> RunProgress:
    """What tells how far the run is, once it has said what it makes of the particles."""
    for note in context.partition.notes:
        logger.warning("%s", note)
    progress = RunProgress(
        Forecast(parts_of(context.config, context.count, context.store.levels)), line, context.world.size
    )
    progress.resumed = resumed
    return progress


def _out_of_memory(error: torch.OutOfMemoryError, context: RunContext) -> TrainingError:
    batch = BATCH_SETTING.get(context.config.recipe, "train.batch_size")
    return TrainingError(
        f"out of memory on {context.device} at box {context.training_level}: lower {batch} or train.box, or use more "
        f"workers for the same batch, then --resume ({str(error).splitlines()[0]})"
    )


def _remaining(stages: Sequence[Stage], checkpoint: Checkpoint | None) -> Sequence[Stage]:
    """The stages from a checkpoint's on, the first of them brought to where it stood."""
    if checkpoint is None:
        return stages
    first = next(number for number, stage in enumerate(stages) if stage.name == checkpoint.stage)
    stages[first].load_state_dict(checkpoint.state)
    return stages[first:]


def _save(stage: Stage, context: RunContext, report: PassReport) -> None:
    """Write a checkpoint, worker 0 alone; curves first, since a checkpoint vouches for those up to it."""
    if context.world.is_leader:
        context.run.sync()
        remove_pause(context.run)
        checkpoint = Checkpoint(report.step, context.config.recipe, stage.name, context.data_hash, stage.state_dict())
        save_checkpoint(context.run, checkpoint, context.config.train.keep_checkpoints, score=report.score)


def load_trained(
    config: Config, store: ParticleStore, run: RunFolder, device: torch.device, *, same_store: bool
) -> tuple[RunContext, Learned]:
    """What a run had learnt at its newest checkpoint; on another store nothing is remembered of its particles.

    Raises:
        CheckpointError: there is none that can be read, or (with `same_store`) it saw another store.
        StoreError: images of another store have another pixel size or box.
    """
    context = RunContext.of(config, store, run, World(), device, same_store=same_store)
    stages, learned = stages_of(context)
    checkpoint = load_checkpoint(
        run, store_hash=context.data_hash if same_store else None, recipe=context.config.recipe
    )
    if checkpoint is None:
        raise CheckpointError(f"{run.url} holds no checkpoint: train it first")
    saved = checkpoint.state.get("references")
    if not same_store and saved is not None:
        references = ReferenceSet.from_state_dict(saved, torch.device("cpu"))
        store.check_images(references.level, references.pixel_size)
    _remaining(stages, checkpoint)
    return context, learned
