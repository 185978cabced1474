"""RELION's particle tables (.star), read and written; the only place that knows `rln…` names.

Why neither starfile nor gemmi: they hold a whole table in memory (gemmi about 49 bytes per value: 9 GB for 10⁷ rows),
and do not write it again as it was. Here a table is read in pieces of 8 MiB, in bounded memory, and rewritten byte for
byte but for the values that change.
"""

from scalecryo.data.formats.relion.columns import add_columns
from scalecryo.data.formats.relion.expand import write_expanded
from scalecryo.data.formats.relion.table import OwnColumns, StarPoses, image_key, read_particles, read_poses
from scalecryo.data.formats.relion.values import (
    CLASS,
    CLASS_PROBABILITY,
    COMPONENT,
    JUNK,
    MAX_CONFIDENCE,
    STATE,
    STATE_PROBABILITY,
)
from scalecryo.data.formats.relion.write import own_table, write_particles, write_rows, write_with_poses

__all__ = [
    "CLASS", "CLASS_PROBABILITY", "COMPONENT", "JUNK", "MAX_CONFIDENCE", "STATE", "STATE_PROBABILITY", "OwnColumns",
    "StarPoses", "add_columns", "image_key", "own_table", "read_particles", "read_poses", "write_expanded",
    "write_particles", "write_rows", "write_with_poses",
]  # fmt: skip
