"""What scalecryo offers to Python: stores as images and tables, runs as maps and curves, and the verbs as functions.

`import scalecryo` alone imports none of this: `scalecryo.open_store` and the others load it when they are first used.
Arrays are numpy's; conventions (axes, hands, signs, units) are README's.
"""

from scalecryo.api.run import Map, Run, Table, open_run
from scalecryo.api.store import Particles, Store, open_store
from scalecryo.api.verbs import convert, reconstruct, simulate

__all__ = [
    "Map",
    "Particles",
    "Run",
    "Store",
    "Table",
    "convert",
    "open_run",
    "open_store",
    "reconstruct",
    "simulate",
]
