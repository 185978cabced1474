"""What is imported is declared: nothing is left to what another package happens to bring."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"scalecryo", "tests", "tools"}
# Imported where a user asks for what they do. CUDA builds of torch bring triton.
OPTIONAL = {"boto3": "s3", "botocore": "s3", "distributed": "cluster", "triton": "test", "tensorstore": "dev",
            "pandas": "pandas"}  # fmt: skip
# A fuzzer's engine that it does without, and scripts that lie side by side.
NOT_DECLARED = {"atheris", *(path.stem for path in (ROOT / "tools").glob("*.py"))}


def imported(folder: str) -> set[str]:
    """Top names of every module that is imported anywhere in a folder, but for the standard library and our own."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - OWN


def declared(*extras: str) -> set[str]:
    """Distributions that an installation with these extras asks for."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize(("folder", "extras"), [("scalecryo", ()), ("tests", ("test", "s3")), ("tools", ("test",))])
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    distributions = packages_distributions()
    missing = []
    for name in imported(folder) - NOT_DECLARED:
        needs = declared(*extras, *([OPTIONAL[name]] if name in OPTIONAL else []))
        if not {canonicalize_name(each) for each in distributions.get(name, [name])} & needs:
            missing.append(name)
    assert missing == []
