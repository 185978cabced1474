"""What adding particles to a store will do: they are checked to be of its kind, and get their numbers in it."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scalecryo.data.conversion.addition import read_addition
from scalecryo.data.conversion.inspect import (
    choose,
    contrast_of_groups,
    drop_rows,
    find_bad_images,
)
from scalecryo.data.conversion.joined_tables import Joined, join_tables
from scalecryo.data.conversion.normalise import Normalisation
from scalecryo.data.conversion.quality import BadImage
from scalecryo.data.conversion.scheduler import ProgressCallback
from scalecryo.data.conversion.source import ReadOptions, Source
from scalecryo.data.io import urls
from scalecryo.data.particles import Columns, ParticleTable
from scalecryo.data.storage.store import EXCLUDED, SOURCE_STACKS, ParticleStore
from scalecryo.errors import InputError, MissingInputError

_OPTICS_COLUMNS = ("voltage", "spherical_aberration", "amplitude_contrast")


@dataclass(frozen=True)
class AppendPlan:
    """What an append will do, all of it decided.

    Args:
        store: as it is.
        source: the new particles; its table names stacks by their number in the store.
        normalisation: how the store's images are normalised.
        attrs: of the group when all is done, but for the content hash.
        documents: source table, stacks and images left out, when all is done.
        contrast: what the new optics groups' images suggest.
        excluded: new images that are left out.
        notes: what a person should know of the joined source table.
    """

    store: ParticleStore
    source: Source
    normalisation: Normalisation
    attrs: dict[str, Any] = field(repr=False)
    documents: dict[str, bytes] = field(repr=False)
    contrast: tuple[dict[str, Any], ...]
    excluded: tuple[BadImage, ...]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of new particles."""
        return len(self.source.table)


def _store_normalisation(
    store: ParticleStore, particles: Source, source: str, sign: int | None, bad_images: str
) -> Normalisation:
    """The store's normalisation, after a look at whether the new images are of its kind."""
    attrs = store.attrs
    judged, reason = choose(particles, store.box_size, None, bad_images)
    shown = urls.redacted(source)
    if judged.kind != attrs["normalisation"]:
        kinds = {"background": "noisy", "common": "noise-free"}
        raise InputError(
            f"{shown}: its images look {kinds[judged.kind]}, the store's are {kinds[attrs['normalisation']]}; "
            "make another store of them"
        )
    option = {1: "--uninvert", -1: "--invert"}
    if sign is not None and sign != attrs["sign"]:
        raise InputError(
            f"{shown}: {option[sign]} was given, but the store was converted with {option[attrs['sign']]}; "
            "make another store of it"
        )
    if sign is None and judged.sign != attrs["sign"] and "unclear" not in reason:
        raise InputError(
            f"{shown}: {reason}, unlike the store's; if that is wrong, say so by {option[attrs['sign']]}, "
            "else make another store of it"
        )
    return Normalisation(store.box_size, attrs["sign"], attrs["normalisation"], attrs["common_scale"])


def _renumbered(old: ParticleTable, new: Columns, joined: Joined) -> Columns:
    """Optics groups of the new particles as in the joined table, or moved past the old where a number is taken."""
    groups = new["optics_group"]
    if joined.groups is not None and set(np.unique(groups).tolist()) <= set(joined.groups):
        return {**new, "optics_group": np.array([joined.groups[group] for group in groups.tolist()])}
    for group in np.unique(groups):
        before, after = old.columns["optics_group"] == group, groups == group
        if not before.any() or "voltage" not in old.columns:
            continue
        ours = [float(old.columns[name][before][0]) for name in _OPTICS_COLUMNS]
        if ours != [float(new[name][after][0]) for name in _OPTICS_COLUMNS]:
            return {**new, "optics_group": groups + old.columns["optics_group"].max()}
    return new


def _in_store(
    store: ParticleStore, old: ParticleTable, particles: Source, source: str
) -> tuple[Source, dict[str, Any]]:
    """The new particles with the store's stack numbers and source rows, and the store's list of stacks.

    Raises:
        InputError: some of them are in the store already.
    """
    stacks = json.loads(urls.read_bytes(urls.join(store.url, SOURCE_STACKS)))
    known = {pair: number for number, pair in enumerate(zip(stacks["names"], stacks["urls"], strict=True))}
    numbers, opened = [], {}
    for name, stack in zip(particles.table.stacks, particles.stacks, strict=True):
        number = known.setdefault((name, urls.redacted(urls.absolute(stack.url))), len(known))
        numbers.append(number)
        opened[number] = stack
    columns = {name: values for name, values in particles.table.columns.items() if name in store.columns}
    columns["stack"] = np.array(numbers)[columns["stack"]]
    if "micrograph" in store.columns:  # a micrograph that is in both counts as two
        own = columns.get("micrograph", np.full(len(columns["stack"]), -1))
        columns["micrograph"] = np.where(own < 0, -1, own + old.columns["micrograph"].max(initial=-1) + 1)
    columns["source_row"] = columns["source_row"] + int(store.attrs.get("source_rows", store.count))
    there = _pairs(old.columns)
    again = np.isin(_pairs(columns), there)
    if again.any():
        row = int(np.flatnonzero(again)[0])
        raise InputError(
            f"{urls.redacted(source)}: {int(again.sum()):,} of its {len(again):,} particles are in the store already, "
            f"such as {particles.table.image_names()[row]}; leave them out of the table"
        )
    names, addresses = zip(*known, strict=True)
    table = ParticleTable(particles.table.pixel_size, tuple(names), columns)
    every = tuple(opened.get(number, particles.stacks[0]) for number in range(len(names)))
    return replace(particles, table=table, stacks=every), {**stacks, "names": names, "urls": addresses}


def _pairs(columns: Columns) -> npt.NDArray[np.int64]:
    """Stack and image as one number."""
    pairs: npt.NDArray[np.int64] = columns["stack"].astype(np.int64) << 40 | columns["stack_index"]
    return pairs


def plan_append(
    source: str,
    store_url: str,
    data_dir: str | None = None,
    sign: str | None = None,
    bad_images: Literal["refuse", "exclude"] = "refuse",
    *,
    workers: int = 0,
    scheduler: str | None = None,
    progress: ProgressCallback | None = None,
    options: ReadOptions | None = None,
    particles: Source | None = None,
) -> AppendPlan:
    """Read the new table and headers, and check that its particles are of the store's kind.

    Args:
        source: the new particles, as for `plan`.
        store_url: a complete store.
        data_dir, sign, bad_images, workers, scheduler, progress, options: as for `plan`.
        particles: what `read_addition` gave for the same arguments, where it was called before.

    Raises:
        MissingInputError: store, table or a stack does not exist.
        StoreError: the store is not complete.
        InputError: the particles do not fit the store, or are in it already.
    """
    store = ParticleStore.open(store_url)
    if particles is None:
        particles = read_addition(source, store, data_dir, bad_images, options)
    wanted = {None: None, "invert": -1, "uninvert": 1}[sign or None]
    normalisation = _store_normalisation(store, particles, source, wanted, bad_images)
    joined = join_tables(store, particles, source)
    excluded: tuple[BadImage, ...] = ()
    if bad_images == "exclude":
        excluded = find_bad_images(particles, normalisation, store.dtype, workers, scheduler, progress)
        particles = drop_rows(particles, excluded)
    old = store.table()
    placed, stacks = _in_store(store, old, particles, source)
    table = ParticleTable(placed.table.pixel_size, placed.table.stacks, _renumbered(old, placed.table.columns, joined))
    placed = replace(placed, table=table)
    documents = {SOURCE_STACKS: json.dumps(stacks).encode(), **joined.documents}
    rows_before = int(store.attrs.get("source_rows", store.count))
    left_out = _left_out(store, excluded, rows_before)
    if left_out:
        documents[EXCLUDED] = json.dumps(left_out, indent=1).encode()
    attrs = {**store.attrs, "count": store.count + len(placed.table), "excluded": len(left_out)}
    attrs["source_rows"] = rows_before + len(placed.table) + len(excluded)
    added = {
        "source": urls.redacted(urls.absolute(source)),
        "count": len(placed.table),
        "grown_from": store.content_hash,
    }
    attrs["appended"] = [*store.attrs.get("appended", []), added]
    identity = [store.attrs["plan_hash"], attrs["count"], attrs["source_rows"], placed.fingerprint()]
    attrs["plan_hash"] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return AppendPlan(
        store, placed, normalisation, attrs, documents, contrast_of_groups(placed, store.box_size), excluded,
        joined.notes,
    )  # fmt: skip


def _left_out(store: ParticleStore, excluded: tuple[BadImage, ...], rows_before: int) -> list[dict[str, Any]]:
    try:
        before = json.loads(urls.read_bytes(urls.join(store.url, EXCLUDED)))
    except MissingInputError:
        before = []
    rows = [{"source_row": rows_before + b.source_row, "image": b.name, "problem": b.problem} for b in excluded]
    return [*before, *rows]
