"""Shapes and types that annotations promise, checked at the calls of each test: jaxtyping with beartype.

At the first thirty calls of each function: a run calls some of them ten thousand times, always alike.
"""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException
from jaxtyping import install_import_hook

import tests

PACKAGE = Path(tests.__file__).resolve().parents[1] / "scalecryo"
# What numba and Triton compile cannot be wrapped.
COMPILED = re.compile(r"^\s*(import|from) (numba|triton|scalecryo\.physics\.kernels\.(jit|vectors))\b", re.MULTILINE)

# An int does where a float is asked for (PEP 484).
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with its arguments checked; as it is where beartype cannot check a hint (a protocol, Self)."""
    try:
        return _beartype(function)
    except BeartypeDecorHintException:
        return function


#: Calls of each function that a test checks, and those that the present one has checked.
MOST_CALLS = 30
calls: Counter[Callable[..., Any]] = Counter()


def _first_calls(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator, of functions as it is for the first calls of each test alone."""

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            verified = jaxtyped(function, typechecker=typechecker)
            if not inspect.isfunction(function):
                return verified

            @functools.wraps(function)
            def called(*arguments: Any, **options: Any) -> Any:
                if calls[function] >= MOST_CALLS:
                    return function(*arguments, **options)
                calls[function] += 1
                return verified(*arguments, **options)

            return called

        return decorate

    return decorator


def check_shapes() -> None:
    """Check the modules that annotate shapes; call it before the package is imported."""
    jaxtyping.jaxtyped = _first_calls(jaxtyping.jaxtyped)  # type: ignore[assignment] # looked up by the hook's code
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if "from jaxtyping import" in text and not COMPILED.search(text):
            modules.append(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    install_import_hook(modules, f"{__name__}.checked")
