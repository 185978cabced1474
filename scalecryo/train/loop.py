"""The training loop: the same for one process and for many, with or without Ray."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scalecryo.config import Config
from scalecryo.data.selection.subset import choose
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch
from scalecryo.distributed.gradients import Replica
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError, TrainingError
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput, build_autoencoder
from scalecryo.model.inputs import ParticleInputs
from scalecryo.runs.checkpoint import load_checkpoint, save_checkpoint
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.monitor import Monitor
from scalecryo.train.batches import data_hash, order_of, particle_inputs, stream_of, training_level
from scalecryo.train.guided_run import train_guided
from scalecryo.train.stages.final_pass import assign_particles
from scalecryo.train.stages.model_poser import ModelPoser


def train(
    config: Config,
    world: World,
    device: torch.device,
    *,
    at_checkpoint: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a run from its newest checkpoint, or from its start where it has none; then assign every particle.

    Args:
        config: everything that determines the run.
        world: this worker's place; with more than one, a process group is already up.
        device: where the tensors live.
        at_checkpoint: called by every worker with the step, after each checkpoint.

    Raises:
        TrainingError: the particles lack what the configuration needs, or the loss stops being a number.
        CheckpointError: see `load_checkpoint`.
    """
    store = ParticleStore.open(config.run.data)
    check_particles(config, store)
    run = RunFolder(config.run.out)
    recipe = train_guided if config.pose.source == "guided" else _train_autoencoder
    try:
        recipe(config, store, run, world, device, at_checkpoint)
        if world.is_leader:
            run.sync()
    except torch.OutOfMemoryError as error:
        lower = "guided.batch_size or train.box" if config.pose.source == "guided" else "train.batch_size or train.box"
        raise TrainingError(
            f"out of memory on {device} at box {training_level(store, config.train.box)}: lower {lower}, or use more "
            f"workers for the same batch, then --resume ({str(error).splitlines()[0]})"
        ) from error
    finally:
        run.close()


def _train_autoencoder(
    config: Config,
    store: ParticleStore,
    run: RunFolder,
    world: World,
    device: torch.device,
    at_checkpoint: Callable[[int], None],
) -> None:
    """The paper's recipe and its controls: gradient descent on pose source and volume together."""
    level = training_level(store, config.train.box)
    rows = min(config.train.rows or store.count, store.count)
    subset = choose(config.train, store)
    model = build_autoencoder(config, level, store.level_pixel_size(level), rows).to(device)
    optimiser = build_optimiser(config, model)
    chosen = data_hash(store, subset)
    start = _restore(run, chosen, model, optimiser)
    order = order_of(config, store, level, config.train.batch_size, subset)
    replica = Replica(model, world, config.optim.reduce_dtype, voxels=model.volume.voxels, window=model.volume.window)
    losses = torch.zeros((), device=device)  # since the last checkpoint
    stream = stream_of(config, store, level, order, world, start, device)
    monitor = Monitor(config, store, run, model, start_step=start, world=world) if world.is_leader else None
    try:
        for step in range(start + 1, config.train.steps + 1):
            batch = next(stream)
            loss, output = train_step(replica, optimiser, batch, particle_inputs(batch, store, level), world, config)
            losses += loss
            if monitor is not None:
                monitor.after_step(step, loss, batch, output, stream.metrics)
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                if not bool(torch.isfinite(loss)):  # host sync
                    raise TrainingError(
                        f"loss is {float(loss)} at step {step}: lower optim.encoder_rate or optim.volume_rate, "
                        "then --resume from the last checkpoint"
                    )
                if world.is_leader:
                    run.sync()  # first: a checkpoint vouches for the curves up to it
                    state = {"store_hash": chosen, "model": model.state_dict(),
                             "optimiser": optimiser.state_dict()}  # fmt: skip
                    mean = float(losses) / ((step - 1) % config.train.checkpoint_every + 1)
                    save_checkpoint(run, step, state, config.train.keep_checkpoints, score=-mean)
                losses.zero_()
                at_checkpoint(step)
    finally:
        stream.close()
        if monitor is not None:
            monitor.close()
    if config.train.final_pass:
        poser = ModelPoser(config, store, model)
        learned = model.volume.density()
        identity = f"{chosen}-{config.train.steps}"
        assign_particles(config, store, poser, run, world, device, identity=identity, subset=subset, learned=learned)


def train_step(
    replica: Replica,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    inputs: ParticleInputs,
    world: World,
    config: Config,
) -> tuple[Tensor, AutoEncoderOutput]:
    """One optimiser step; returns the global batch's mean loss and this worker's output.

    The global loss is Σ weight·loss / Σ weight over all workers. Gradients are averaged over workers, so each
    worker's share is scaled by their number: any split of the batch gives the same step.
    """
    weight = batch.weight.sum()
    settle = world.all_reduce_async(weight)  # its way is shorter than the forward pass
    output = replica(inputs)
    loss = (batch.weight * output.loss).sum()
    settle()
    share = loss * (world.size / weight)
    optimiser.zero_grad(set_to_none=True)
    share.backward()
    replica.finish()
    if config.optim.clip_norm > 0:
        encoder = [p for g in optimiser.param_groups if g["name"] == "encoder" for p in g["params"]]
        nn.utils.clip_grad_norm_(encoder, config.optim.clip_norm)
    optimiser.step()
    total = loss.detach()
    world.all_reduce_(total)  # last: by now every worker is here, since all have each other's gradients
    return total / weight, output


def build_optimiser(config: Config, model: AutoEncoder) -> torch.optim.Adam:
    """Adam with one learning rate a kind of parameter."""
    rates = {
        "volume": (list(model.volume.parameters()), config.optim.volume_rate),
        "encoder": (list(model.pose_source.parameters()), config.optim.encoder_rate),
    }
    if config.pose.source == "table":
        rates["table"] = (rates.pop("encoder")[0], config.optim.table_rate)
    groups = [{"name": name, "params": params, "lr": rate} for name, (params, rate) in rates.items() if params]
    return torch.optim.Adam(groups, fused=True)


def check_particles(config: Config, store: ParticleStore) -> None:
    """Raise a TrainingError where the store lacks poses that the recipe reads, or particles for every worker."""
    if config.recipe in ("known", "poses") and not store.has_pose:
        raise TrainingError(
            f"{config.run.data}: the recipe {config.recipe} needs poses, and the store has none: convert a table with "
            "rotation angles, or choose another recipe"
        )
    low, _ = config.run.worker_range
    if store.count < max(low, 1):
        raise TrainingError(f"{config.run.data}: {store.count} particles for {low} workers: use fewer workers")


def _restore(run: RunFolder, data_hash: str, model: AutoEncoder, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into model and optimiser; returns the number of finished steps."""
    state = load_checkpoint(run, store_hash=data_hash, wanted=("model", "optimiser"))
    if state is None:
        return 0
    _load_model(run, model, state)
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def load_trained(config: Config, store: ParticleStore, run: RunFolder, *, same_store: bool) -> AutoEncoder:
    """The model of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none that can be read, or (with `same_store`) it saw another store.
    """
    level = training_level(store, config.train.box)
    rows = min(config.train.rows or store.count, store.count)
    model = build_autoencoder(config, level, store.level_pixel_size(level), rows)
    chosen = data_hash(store, choose(config.train, store)) if same_store else None
    state = load_checkpoint(run, store_hash=chosen, wanted=("model",))
    if state is None:
        raise CheckpointError(f"{run.url} holds no checkpoint: train it first")
    _load_model(run, model, state)
    return model


def _load_model(run: RunFolder, model: AutoEncoder, state: dict[str, Any]) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{run.url}: the checkpoint does not fit the configuration ({' '.join(str(error).split())[:200]}): "
            "use the settings that it was trained with"
        ) from None
