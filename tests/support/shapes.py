"""Shapes and types that annotations promise, checked at every call: jaxtyping with beartype."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception
from jaxtyping import install_import_hook

import tests

PACKAGE = Path(tests.__file__).resolve().parents[1] / "scalecryo"
# What numba and Triton compile cannot be wrapped.
COMPILED = re.compile(r"^\s*(import|from) (numba|triton|scalecryo\.physics\.kernels\.(jit|vectors))\b", re.MULTILINE)

# An int does where a float is asked for (PEP 484).
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function or class with its arguments checked; as it is where they name a protocol, which has no instances, or
    `Self`, which means nothing to a method that is checked on its own."""
    try:
        return _beartype(function)
    except (BeartypeDecorHintPep3119Exception, BeartypeDecorHintPep673Exception):
        return function


def check_shapes() -> None:
    """Check every call of the modules that annotate shapes; call it before the package is imported."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if "from jaxtyping import" in text and not COMPILED.search(text):
            modules.append(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    install_import_hook(modules, f"{__name__}.checked")
