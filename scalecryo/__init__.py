"""Distributed, streaming trainer for cryo-EM ab initio reconstruction.

`open_store`, `open_run`, `reconstruct`, `simulate` and `convert` are its public API (`scalecryo.api`). They are loaded
when they are first used, since PyTorch takes seconds to import.
"""

import importlib

__version__ = "0.1.0"
_PUBLIC = ("Map", "Particles", "Run", "Store", "Table", "convert", "open_run", "open_store", "reconstruct", "simulate")


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("scalecryo.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
