"""The source table of a store to which particles are added: one table out of both, by what they mean."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.conversion.source import Source
from scalecryo.data.conversion.stacks import micrograph_shape
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.relion.merge import merge
from scalecryo.data.formats.relion.syntax import StarText
from scalecryo.data.formats.translate import Extra, cryosparc_extra, relion_extra
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.storage.store import SOURCE_CS, SOURCE_TABLE, ParticleStore

_GROUP = "ctf/exp_group_id"
_OPTICS = ("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast")


class Joined(NamedTuple):
    """The source table of old and new particles.

    Args:
        documents: the table's file by its key in the store; empty where there is none that holds both.
        groups: new numbers of the new particles' optics groups; None where the table does not decide them.
        notes: what a person should know of it.
    """

    documents: dict[str, bytes]
    groups: Mapping[int, int] | None
    notes: tuple[str, ...]


def join_tables(store: ParticleStore, particles: Source, source: str) -> Joined:
    """One source table for a store and what is added to it.

    Raises:
        InputError: a table cannot be read.
    """
    shown, box = urls.redacted(source), int(store.attrs["source_box_size"])
    star, cs = store.source_star(), store.source_cs()
    if star is None and cs is None:
        if particles.star is None and particles.cs is None:
            return Joined({}, None, ())
        # A bare stack's rows become a table of the kind that comes now.
        old = store.table() if store.count == int(store.attrs.get("source_rows", store.count)) else None
        if old is not None and particles.star is not None:
            star = _star_of(old, box, None)
        elif old is not None:
            cs = csrows.encode(cryosparc.own_rows(old, box, int(store.attrs["sign"])))
    whole = np.array_equal(particles.table.columns["source_row"], np.arange(len(particles.table)))
    if star is not None and (particles.star is not None or whole):
        new = particles.star
        if new is None:
            new = _star_of(particles.table, box, particles.cs)
        merged = merge(StarText(star, store.url), StarText(new, shown), store.source_pixel_size, box)
        return Joined({SOURCE_TABLE: merged.text}, merged.groups or None, _filled(merged.filled))
    if cs is not None and (particles.cs is not None or whole):
        rows = _cs_of(particles, box, store, source) if particles.cs is None else csrows.decode(particles.cs, shown)
        return _joined_cs(store, csrows.decode(cs, store.url), rows)
    return Joined(
        {}, None, ("no one table holds the old and the new particles: exports write the store's own columns",)
    )


def _star_of(table: ParticleTable, box: int, cs: bytes | None) -> bytes:
    """A table as a STAR file, with what its .cs file says that RELION has a column for."""
    pose = (table.columns["rotation"], table.columns["shift"]) if table.has_pose else None
    extra = Extra({}, {}, ()) if cs is None else relion_extra(csrows.decode(cs, "the new table"))
    return b"".join(relion.own_table(table, pose, table.columns["half"], None, box, extra.columns, extra.optics))


def _cs_of(particles: Source, box: int, store: ParticleStore, source: str) -> NDArray[np.void]:
    """A source's rows as cryoSPARC keeps them."""
    table, sign = particles.table, int(store.attrs["sign"])
    if particles.star is None:
        return cryosparc.own_rows(table, box, sign)
    own = relion.OwnColumns(particles.star, urls.redacted(source))
    extra = cryosparc_extra(own, lambda name: micrograph_shape(name, source, None), table.pixel_sizes(), table.has_pose)
    return cryosparc.own_rows(table, box, sign, more=extra.columns)


def _filled(names: tuple[str, ...]) -> tuple[str, ...]:
    return (f"only one of the tables has {', '.join(names)}: 0 or None stands in the other's rows",) if names else ()


def _joined_cs(store: ParticleStore, first: NDArray[np.void], second: NDArray[np.void]) -> Joined:
    known = {"blob/sign": float(store.attrs["sign"]), "alignments3D/psize_A": store.source_pixel_size}
    rows, filled = csrows.merge(first, second, known)
    names = rows.dtype.names or ()
    if _GROUP not in names:
        return Joined({SOURCE_CS: csrows.encode(rows)}, None, _filled(filled))
    moved = _moved_groups(rows[: len(first)], rows[len(first) :])
    groups = rows[_GROUP][len(first) :]
    rows[_GROUP][len(first) :] = [moved.get(group, group) for group in groups.tolist()]
    # Our optics groups count from 1, cryoSPARC's from 0.
    numbers = {group + 1: moved.get(group, group) + 1 for group in np.unique(groups).tolist()}
    return Joined({SOURCE_CS: csrows.encode(rows)}, numbers, _filled(filled))


def _moved_groups(first: NDArray[np.void], second: NDArray[np.void]) -> dict[int, int]:
    """New numbers of the second table's exposure groups, where the first one's mean other optics by the same."""
    names = [name for name in _OPTICS if name in (first.dtype.names or ())]

    def optics(rows: NDArray[np.void]) -> dict[int, tuple[float, ...]]:
        groups, line = np.unique(rows[_GROUP], return_index=True)
        return {
            int(group): tuple(float(rows[name][at]) for name in names) for group, at in zip(groups, line, strict=True)
        }

    ours, theirs = optics(first), optics(second)
    free = max((*ours, *theirs), default=0) + 1
    moved: dict[int, int] = {}
    for group, values in theirs.items():
        if group in ours and ours[group] != values:
            same = next((old for old, known in ours.items() if known == values), None)
            moved[group] = free if same is None else same
            free += same is None
    return moved
