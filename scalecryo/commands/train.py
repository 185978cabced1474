"""`scalecryo train`: from a store, from nothing, to a map and poses."""

import dataclasses

import torch

from scalecryo.commands.console import say
from scalecryo.config import Config, config_from_dict, load_config
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import ConfigError, UsageError
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.recorder import log_to_stderr
from scalecryo.train.loop import train


def run(
    config: str | None,
    *,
    data: str | None,
    out: str | None,
    workers: str | None,
    device: str | None,
    resume: bool,
    overrides: dict[str, str],
) -> None:
    """Resolve the configuration, start or resume the run's folder, and train."""
    flags = {"data": data, "out": out, "workers": workers, "device": device}
    given = {f"run.{name}": value for name, value in flags.items() if value is not None}
    settings = _resolve(config, {**overrides, **given}, resume)
    if not settings.run.data or not settings.run.out:
        raise UsageError("train needs --data STORE and --out RUN (with --resume, --out alone)")
    settings = _absolute(settings)
    if settings.run.device == "cuda" and not torch.cuda.is_available() and settings.run.workers == "0":
        raise ConfigError("config: run.device = 'cuda': no CUDA device is visible here: use --device cpu")
    log_to_stderr()
    ParticleStore.open(settings.run.data)  # fail before the run's folder exists
    RunFolder(settings.run.out).create(settings, resume=resume)
    if settings.run.worker_range == (0, 0):
        train(settings, World(), torch.device(settings.run.device))
    else:
        # Ray takes seconds to import: only when it is asked for.
        from scalecryo.train.ray_workers import train_on_ray

        train_on_ray(settings)
    say(f"run finished: {settings.run.out}")


def _resolve(path: str | None, overrides: dict[str, str], resume: bool) -> Config:
    """The configuration: of the file, else (when resuming) of the run itself, under the overrides."""
    if path is None and resume and "run.out" in overrides:
        stored = RunFolder(overrides["run.out"])
        if urls.exists(stored.path("config.toml")):
            return load_config(None, overrides, base=dataclasses.asdict(stored.config()))
    return load_config(path, overrides)


def _absolute(config: Config) -> Config:
    """Local paths made absolute, since Ray workers run in another folder."""
    values = dataclasses.asdict(config)
    for section, key in (("run", "data"), ("run", "out"), ("monitor", "truth"), ("train", "index")):
        if values[section][key]:
            values[section][key] = urls.absolute(values[section][key])
    return config_from_dict(values)
