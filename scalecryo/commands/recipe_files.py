"""TOML files of settings that come with the package: `configs/` of the checkout, in the wheel beside the modules."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from scalecryo.errors import UsageError

_FOLDER = "configs"


def recipe_file(name: str | None, config: str | None) -> str | None:
    """The path of a recipe by its name, or of the TOML file that was given.

    Raises:
        UsageError: both were given, or there is no such recipe.
    """
    if name is None:
        return config
    if config is not None:
        raise UsageError(f"train takes a TOML file or --recipe, not both: {config} and {name}")
    known = {entry.name.removesuffix(".toml"): entry for entry in _folder().iterdir() if entry.name.endswith(".toml")}
    if name not in known:
        raise UsageError(f"--recipe {name}: no such recipe: choose {', '.join(sorted(known))}")
    return str(known[name])


def _folder() -> Traversable:
    """Beside the modules in a wheel; one folder up in a checkout."""
    packaged = files("scalecryo") / _FOLDER
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / _FOLDER
