"""Run a script as on a machine that has torch, numpy, scipy, numba, matplotlib, the wheels of a list and nothing else.

    python tests/support/bare_machine.py LIST SCRIPT [arguments …]

What else is installed here cannot be imported: it looks as if it were there and fails, as a broken installation does.
"""

import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

MACHINE = ("torch", "numpy", "scipy", "numba", "matplotlib", "triton", "pip", "packaging")


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def with_dependencies(names: Sequence[str]) -> set[str]:
    """Distributions and all that they need here, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = name_of(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        parsed = [Requirement(text) for text in needed]
        waiting += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def listed(path: Path) -> Iterator[str]:
    """Names of a requirements file."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield name_of(line.split("==")[0])


class Refused:
    """Finds every package of other distributions, and cannot load it."""

    def __init__(self, allowed: set[str]) -> None:
        self._refused = {
            package
            for package, distributions in packages_distributions().items()
            if not any(name_of(one) in allowed for one in distributions)
        } - {"tests", "scalecryo", "tools"}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.split(".")[0] in self._refused else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError("it was never made")


if __name__ == "__main__":
    wanted, script, *rest = sys.argv[1:]
    sys.meta_path.insert(0, Refused(with_dependencies(MACHINE) | set(listed(Path(wanted)))))  # type: ignore[arg-type]
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")
