"""The settings of a run as options of `train`: first those that people set, then by section. Imports no torch."""

from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, TypedDict

from cyclopts import Group, Parameter

from scalecryo.config import SECTIONS
from scalecryo.settings import RECIPES

FIRST = Group("What people set", sort_key=0)

#: The nine that people set: also --data … --symmetry, and first in the help.
COMMON = ("run.data", "run.out", "run.workers", "run.device", "train.symmetry", "train.classes", "train.components",
          "train.mask", "train.diameter_a")  # fmt: skip


def _option(name: str, field: Field[Any], group: Group, shared: Sequence[str]) -> Any:
    """A setting as an option: its type, help, default, and the recipes that read it where others of its group have
    others."""
    many, readers = isinstance(field.default, tuple), field.metadata["recipes"]
    default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default).strip("()")
    every = len(readers) == len(RECIPES)
    only = f" (recipe {'any' if every else ', '.join(readers)})"
    if (set(readers) == set(shared) and name not in COMMON) or (every and name in COMMON):
        only = ""
    parameter = Parameter(
        name=(f"--{field.name.replace('_', '-')}", f"--{name}") if name in COMMON else f"--{name}",
        help=field.metadata["help"] + only,
        group=FIRST if name in COMMON else group,
        show_default=default or False,
        metavar="INT,..." if many else None,
    )
    kind = str if many or field.metadata["words"] else field.type
    return Annotated[kind, parameter]


def _shared_readers(section: Any) -> tuple[str, ...]:
    """The recipes that read most settings of a section: said once, in its heading."""
    every = [field.metadata["recipes"] for field in fields(section)]
    return max(every, key=every.count)


def settings_options() -> Any:
    """What cyclopts reads settings into: nested dictionaries of those that were given, and nothing else.

    The dataclasses themselves would check the command line before the TOML file under it is known.
    """
    typed_dict: Any = TypedDict
    sections = {}
    for number, (section, kind) in enumerate(SECTIONS.items()):
        shared = _shared_readers(kind)
        heading = kind.__doc__ if len(shared) == len(RECIPES) else f"{kind.__doc__} Recipe {', '.join(shared)}."
        group = Group(f"{section} settings", help=heading, sort_key=10 + number)
        keys = {field.name: _option(f"{section}.{field.name}", field, group, shared) for field in fields(kind)}
        sections[section] = typed_dict(section, keys, total=False)
    return Annotated[typed_dict("Settings", sections, total=False), Parameter(name="*")]
