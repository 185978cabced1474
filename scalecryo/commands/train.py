"""`scalecryo train`: from a store, from nothing, to a map and poses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scalecryo.commands.console import say
from scalecryo.config import Config, config_from_dict, load_config
from scalecryo.data.io import urls
from scalecryo.errors import ConfigError, UsageError
from scalecryo.runs.folder import RunFolder


def run(config: str | None, *, resume: bool, overrides: Mapping[str, Any], **places: str) -> None:
    """Resolve the configuration, start or resume the run's folder, and train.

    What can be refused is refused before the folder exists. `places` are settings of [run]: data, out, workers, device.
    """
    settings = _resolve(config, {**overrides, **{f"run.{key}": value for key, value in places.items()}}, resume)
    if not settings.run.data or not settings.run.out:
        raise UsageError("train needs --data STORE and --out RUN (with --resume, --out alone)")
    settings = _absolute(settings)
    # torch takes seconds to import: by now the command line and the settings are in order.
    import torch

    from scalecryo.distributed.world import World
    from scalecryo.runs.checkpoint import is_finished
    from scalecryo.runs.recorder import log_to_stderr
    from scalecryo.train.loop import train

    if settings.run.device == "cuda" and not torch.cuda.is_available() and settings.run.workers == "0":
        raise ConfigError("config: run.device = 'cuda': no CUDA device is visible here: use --device cpu")
    log_to_stderr()
    data_hash, run_folder = _check(settings), RunFolder(settings.run.out)
    if resume and is_finished(run_folder, settings, data_hash):
        say(f"run finished already: {settings.run.out}; its results are as they were")
        return
    run_folder.create(settings, resume=resume)
    if settings.run.worker_range == (0, 0):
        train(settings, World(), torch.device(settings.run.device))
    else:
        # Ray takes seconds to import: only when it is asked for.
        from scalecryo.train.ray_workers import train_on_ray

        train_on_ray(settings)
    say(f"run finished: {settings.run.out}")


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
    from scalecryo.train.particle_source import RunContext, check_particles

    store = ParticleStore.open(config.run.data)
    check_particles(config, store)
    context = RunContext.of(config, store, RunFolder(config.run.out), World(), torch.device("cpu"))
    level = context.training_level
    _ = context.solvent  # which reads the mask and checks it
    if config.recipe == "paper":
        encoder_box(config, level)
    if config.monitor.truth:
        Truth.load(config.monitor.truth, store, level)
    return context.data_hash


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
