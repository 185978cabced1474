"""Particles that are to be added to a store: read, and refused where they are of another kind. Imports no torch."""

from dataclasses import replace
from typing import Literal

from scalecryo.data.conversion.source import ReadOptions, Source, read_source
from scalecryo.data.io import urls
from scalecryo.data.particles import ABERRATION_COLUMNS, COLUMNS
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError


def read_addition(
    source: str,
    store: ParticleStore,
    data_dir: str | None = None,
    bad_images: Literal["refuse", "exclude"] = "refuse",
    options: ReadOptions | None = None,
) -> Source:
    """The new table and headers, whose box, pixel size and columns are the store's.

    Args:
        source: the new particles, as for `plan`.
        store: a complete store.
        data_dir, bad_images, options: as for `plan`.

    Raises:
        MissingInputError: table or a stack does not exist.
        InputError: the particles do not fit the store.
    """
    particles = read_source(source, data_dir, replace(options or ReadOptions(), leave_out=bad_images == "exclude"))
    if particles.resampling:
        raise InputError(
            f"{urls.redacted(source)}: stacks of several pixel sizes cannot be added to a store; make another of them"
        )
    _refuse_other_kind(store, particles, source)
    return particles


def _refuse_other_kind(store: ParticleStore, particles: Source, source: str) -> None:
    """Raise when the new particles do not fit the store."""
    shown = urls.redacted(source)
    box, pixel_size = int(store.attrs["source_box_size"]), store.source_pixel_size
    if particles.box_size != box:
        raise InputError(f"{shown}: box {particles.box_size} px, the store's source had {box} px; extract in that box")
    if abs(particles.pixel_size / pixel_size - 1) > 1e-3:
        raise InputError(
            f"{shown}: pixel size {particles.pixel_size:.4g} Å, the store's source had {pixel_size:.4g} Å; "
            "rescale the particles, or make another store"
        )
    more = [name for name in ABERRATION_COLUMNS if name in particles.table.columns and name not in store.columns]
    if more:
        raise InputError(
            f"{shown}: has aberrations of the optics ({', '.join(more)}), the store has none; make another store of it"
        )
    missing = [name for name in store.columns if name in COLUMNS and name not in particles.table.columns]
    missing = [name for name in missing if name != "micrograph"]
    if missing:
        raise InputError(f"{shown}: has no {', '.join(missing)}, which the store has; make another store of it")
