"""`scalecryo train`: from a store, from nothing, to a map and poses."""

import dataclasses
import glob
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from scalecryo.commands.closing import say_results
from scalecryo.commands.console import say
from scalecryo.commands.following import Follower, check_following
from scalecryo.config import Config, config_from_dict, load_config
from scalecryo.data.io import urls
from scalecryo.errors import ConfigError, UsageError
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.log import log_to_stderr

logger = logging.getLogger(__name__)
# One of them is there wherever torch finds a GPU: NVIDIA's drivers, Jetson, WSL, ROCm.
GPU_NODES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dxg", "/dev/kfd")


def run(
    config: str | None,
    *,
    resume: bool,
    overrides: Mapping[str, Any],
    follow_hours: float | None = None,
    **places: str,
) -> None:
    """Resolve the configuration, start or resume the run's folder, and train.

    What can be refused is refused before the folder exists. `places` are settings of [run]: data, out, workers, device.
    With `follow_hours` the run goes on each time that particles were appended to the store, for so long (infinity:
    until the file `stop` lies in its folder).
    """
    settings = _resolve(config, {**overrides, **{f"run.{key}": value for key, value in places.items()}}, resume)
    if not settings.run.data or not settings.run.out:
        raise UsageError("train needs --data STORE and --out RUN (with --resume, --out alone)")
    settings = _absolute(settings)
    if follow_hours is not None:
        check_following(settings)
    line = log_to_stderr()
    _foresee(settings, resume)
    # torch takes seconds to import: by now the command line and the settings are in order.
    import torch

    from scalecryo.distributed.world import World
    from scalecryo.runs.checkpoint import is_finished
    from scalecryo.train.loop import train
    from scalecryo.train.stopping import Notice, notice_of_sigterm

    if settings.run.device == "cuda" and not torch.cuda.is_available() and settings.run.workers == "0":
        raise _no_device()
    data_hash, run_folder = _check(settings), RunFolder(settings.run.out)

    def once() -> None:
        if settings.run.worker_range == (0, 0):
            notice = Notice()
            with notice_of_sigterm(notice.give):
                train(settings, World(), torch.device(settings.run.device), line=line, notice=notice)
        else:
            # Ray takes seconds to import: only when it is asked for.
            from scalecryo.train.ray_workers import train_on_ray

            train_on_ray(settings)
        say(f"run finished: {settings.run.out}")
        say_results(run_folder)

    follower = None if follow_hours is None else Follower(settings, data_hash.partition(":")[0], follow_hours)
    if resume and is_finished(run_folder, settings, data_hash):
        say(f"run finished already: {settings.run.out}; its results are as they were")
    else:
        run_folder.create(settings, resume=resume)
        once()
    if follower is not None:
        follower.follow(once)


def _no_device() -> ConfigError:
    """The error that no GPU is seen."""
    return ConfigError("config: run.device = 'cuda': no CUDA device is visible here: use --device cpu")


def _foresee(config: Config, resume: bool) -> None:
    """Refuse what names and attributes tell, before torch is imported.

    Raises:
        MissingInputError, StoreError: no store, mask or truth there.
        ConfigError, TrainingError: the store cannot give what the recipe needs, or the machine not the memory.
        OutputExistsError: the folder holds a run.
    """
    from scalecryo.data.storage.store import ParticleStore
    from scalecryo.train.forecast import Forecast, parts_of
    from scalecryo.train.memory import check_memory, machine_bytes
    from scalecryo.train.requirements import check_particles, training_level

    alone = config.run.worker_range == (0, 0)
    if config.run.device == "cuda" and alone and sys.platform == "linux" and not any(map(glob.glob, GPU_NODES)):
        raise _no_device()
    RunFolder(config.run.out).refuse_another(resume=resume)
    store = ParticleStore.open(config.run.data)
    check_particles(config, store)
    level = training_level(config, store)
    for name in (config.train.mask, config.train.index, *_truth_files(config.monitor.truth)):
        if name:
            urls.check_there(name)
    machine = None if os.environ.get("RAY_ADDRESS") else machine_bytes()  # a cluster's nodes are other machines
    need = check_memory(config, store.levels, machine)
    count, (_, workers) = min(config.train.rows or store.count, store.count), config.run.worker_range
    where = f"{workers} workers" if workers else "this process"
    forecast = Forecast(parts_of(config, count, store.levels))
    memory = "" if config.run.device == "cuda" else f"; {need.peak / 2**30:.1f} GiB of memory{' each' * (workers > 1)}"
    logger.info("%s particles, %d px, recipe %s, %s: %s%s", f"{count:,}", level, config.recipe, where, forecast, memory)


def _check(config: Config) -> str:
    """Refuse what the store or the truth cannot give. Every worker would, but only after the run's folder is there.

    Returns:
        The hash of the particles, as checkpoints keep it.
    """
    import torch

    from scalecryo.data.storage.store import ParticleStore
    from scalecryo.distributed.world import World
    from scalecryo.model.autoencoder import encoder_box
    from scalecryo.runs.truth import Truth
    from scalecryo.train.particle_source import RunContext

    store = ParticleStore.open(config.run.data)
    context = RunContext.of(config, store, RunFolder(config.run.out), World(), torch.device("cpu"))
    level = context.training_level
    _ = context.solvent  # which reads the mask and checks it
    if config.recipe == "paper":
        encoder_box(config, level)
    if config.monitor.truth:
        Truth.load(config.monitor.truth, store, level)
    return context.data_hash


def _truth_files(folder: str) -> list[str]:
    return [urls.join(folder, name) for name in ("truth.star", "truth.mrc")] if folder else []


def _resolve(path: str | None, overrides: Mapping[str, Any], resume: bool) -> Config:
    """The configuration: of the file, else (when resuming) of the run itself, under the overrides."""
    if path is None and resume and "run.out" in overrides:
        stored = RunFolder(overrides["run.out"])
        if urls.exists(stored.path("config.toml")):
            return load_config(None, overrides, base=dataclasses.asdict(stored.config()))
    return load_config(path, overrides)


def _absolute(config: Config) -> Config:
    """Local paths made absolute, since Ray workers run in another folder."""
    values = dataclasses.asdict(config)
    for section, key in (("run", "data"), ("run", "out"), ("monitor", "truth"), ("train", "index"), ("train", "mask")):
        if values[section][key]:
            values[section][key] = urls.absolute(values[section][key])
    return config_from_dict(values)
