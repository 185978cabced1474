"""Scripts of tools/ as modules: those beside them are imported by their bare names, as when they are run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/NAME.py, for as long as the test lasts."""
    monkeypatch.syspath_prepend(str(TOOLS))
    own = f"tool_{name}"
    spec = importlib.util.spec_from_file_location(own, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, own, module)
    spec.loader.exec_module(module)
    return module
