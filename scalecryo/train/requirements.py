"""What a recipe asks of a store, as far as its attributes tell. Imports no torch."""

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError, TrainingError


def one_assembly(config: Config) -> bool:
    """Whether there are several classes, of one assembly, whose maps share a frame."""
    return config.train.several and (config.train.class_mode == "docked" or config.recipe == "poses")


def check_particles(config: Config, store: ParticleStore) -> None:
    """Refuse a store that cannot give what the recipe needs.

    Raises:
        TrainingError: no poses where the recipe reads them, or fewer particles than workers.
    """
    if config.recipe in ("known", "poses") and not store.has_pose:
        raise TrainingError(
            f"{config.run.data}: the recipe {config.recipe} needs poses, and the store has none: convert a table with "
            "rotation angles, or choose another recipe"
        )
    low, _ = config.run.worker_range
    if store.count < max(low, 1):
        raise TrainingError(f"{config.run.data}: {store.count} particles for {low} workers: use fewer workers")


def training_level(config: Config, store: ParticleStore) -> int:
    """The level that train.box names.

    Raises:
        ConfigError: the store has no such level.
    """
    level = config.train.box or store.box_size
    if level not in store.levels:
        raise ConfigError(
            f"config: train.box = {level}: the store {store.url} has levels {', '.join(map(str, store.levels))} px"
        )
    return level
