"""Which rows of a particle table to keep: by number, condition, half or confidence."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.data.particles import COLUMNS, Columns, ParticleTable
from scalecryo.data.selection.query import Query
from scalecryo.data.selection.subset import read_index
from scalecryo.errors import InputError

#: Gives a column of the source's own by name, as numbers.
Lookup = Callable[[str], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Selection:
    """What must hold of a particle for it to be kept; None asks for nothing.

    Args:
        index: file of row numbers, from 0.
        query: condition on columns.
        half: 1 or 2.
        min_confidence: 0 to 1.
    """

    index: str | None = None
    query: str | None = None
    half: int | None = None
    min_confidence: float | None = None

    def mask(
        self, table: ParticleTable, confidence: npt.NDArray | None, names: Collection[str], lookup: Lookup
    ) -> npt.NDArray[np.bool_]:
        """Whether each row is kept.

        Args:
            table: the particles.
            confidence: of each; None where the source has none.
            names: the source's own columns, which a condition may name too.
            lookup: gives them.

        Raises:
            ConfigError: the condition or the file of row numbers cannot be understood.
            InputError: the table lacks what is asked for, or no row is left.
        """
        keep = np.ones(len(table), dtype=bool)
        if self.half is not None:
            if not table.columns["half"].any():
                raise InputError(f"--half {self.half}: the table does not say which half a particle belongs to")
            keep &= table.columns["half"] == self.half
        if self.min_confidence is not None:
            if confidence is None:
                raise InputError(f"--min-confidence {self.min_confidence:g}: the table has no confidence")
            keep &= confidence >= self.min_confidence
        if self.query is not None:
            keep &= self._holds(self.query, table, confidence, names, lookup)
        if self.index is not None:
            rows = read_index(self.index, len(table), len(table), "the table")
            listed = np.zeros(len(table), dtype=bool)
            listed[rows] = True
            keep &= listed
        if not keep.any():
            raise InputError(f"none of {len(table):,} particles is selected; ask for less")
        return keep

    @staticmethod
    def _holds(
        text: str, table: ParticleTable, confidence: npt.NDArray | None, names: Collection[str], lookup: Lookup
    ) -> npt.NDArray[np.bool_]:
        own: Columns = {name: values for name, values in table.columns.items() if not COLUMNS[name][1]}
        if confidence is not None:
            own["confidence"] = confidence
        query = Query.parse(text, {*own, *names}, "--query")
        return query.evaluate({name: own[name] if name in own else lookup(name) for name in query.columns})
