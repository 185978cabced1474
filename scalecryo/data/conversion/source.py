"""What a conversion reads: a particle table, and the stacks it names, found and checked by their headers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from scalecryo.data.conversion.metadata_overrides import with_ctf, with_poses
from scalecryo.data.conversion.places import STACK_ENDINGS, unknown_kind
from scalecryo.data.conversion.resample import Resampling, plan_resampling, resampled
from scalecryo.data.conversion.stacks import open_stacks
from scalecryo.data.formats import cryosparc, csoptics, csrows
from scalecryo.data.formats.mrc import Stack
from scalecryo.data.formats.relion import read_particles as read_star
from scalecryo.data.formats.relion.syntax import StarText, Text, text_of
from scalecryo.data.formats.relion.values import not_applied
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError

_SAME_PIXEL = 1e-4
_CLOSE_PIXEL = 0.01  # headers are often rounded
_MOST_KV, _LEAST_DEFOCUS = 5000.0, 50.0  # kV, and Å of the farthest from focus


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Args:
        passthrough: cryoSPARC files of the same particles with more fields.
        ctf: CTF in place of the table's: a cryoDRGN .pkl, or `voltage=300,defocus_u=15000,…` for every image.
        poses: poses in place of the table's: a cryoDRGN .pkl.
        pixel_size: Å, where neither table nor stack says it; it goes before a stack's header.
        mixed_optics: what to do with stacks of several pixel sizes.
        allow_outside: read stacks that a table names outside the data folder.
        leave_out: rows with nan or inf in CTF or pose are left out, not an error.
    """

    passthrough: tuple[str, ...] = ()
    ctf: str | None = None
    poses: str | None = None
    pixel_size: float | None = None
    mixed_optics: Literal["refuse", "resample"] = "refuse"
    allow_outside: bool = False
    leave_out: bool = False


@dataclass(frozen=True)
class Source:
    """A table and its stacks, one for one with `table.stacks`.

    Args:
        table: the particles.
        stacks: opened stacks; all square, even, and of one box size.
        box_size: that box, px.
        pixel_size: Å, of the table or else of the stacks' headers.
        star: the table's file verbatim, when it is a .star file.
        cs: the table as a .cs file, when it came from cryoSPARC; files that were joined are one.
        sign: −1 or 1 where the table says that the images are protein-dark or bright.
        notes: what the table says that is kept but not made use of.
        resampling: how each stack's images were brought to one pixel size; empty where they have one.
        left_out: rows that are not in the table, and why.
    """

    table: ParticleTable
    stacks: tuple[Stack, ...] = field(repr=False)
    box_size: int
    pixel_size: float
    star: Text | None = field(repr=False, default=None)
    cs: bytes | None = field(repr=False, default=None)
    sign: int | None = None
    notes: tuple[str, ...] = ()
    resampling: tuple[Resampling, ...] = field(repr=False, default=())
    left_out: Mapping[int, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Hash of the table and of every stack's length and time of change."""
        digest = hashlib.sha256()
        for name, values in sorted(self.table.columns.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        for name, stack in zip(self.table.stacks, self.stacks, strict=True):
            digest.update(repr((name, stack.fingerprint)).encode())
        digest.update(repr(self.resampling).encode() if self.resampling else b"")
        return digest.hexdigest()


def _check_indices(table: ParticleTable, stacks: tuple[Stack, ...], where: str) -> None:
    """Refuse an image number past the end of its stack."""
    last = np.full(len(stacks), -1, dtype=np.int64)
    np.maximum.at(last, table.columns["stack"], table.columns["stack_index"])
    past = last >= np.array([stack.count for stack in stacks])
    if past.any():
        number = int(np.flatnonzero(past)[0])
        raise InputError(
            f"{urls.redacted(stacks[number].url)}: {where} asks for image {last[number] + 1} but the stack holds "
            f"{stacks[number].count}; they do not belong together"
        )


def _check_boxes(
    table: ParticleTable, stacks: tuple[Stack, ...], where: str, notes: tuple[str, ...]
) -> tuple[str, ...]:
    """Compare the stacks' boxes with the table's.

    A cryoSPARC table counts shifts in pixels of its own box: stacks of another are refused. STAR files of resampled
    stacks often keep the old rlnImageSize beside the right pixel size: they are taken, and it is said.
    """
    for stack, stated in zip(stacks, table.stack_boxes, strict=False):
        if stated == stack.box_size:
            continue
        if where.lower().endswith(".star"):
            return (*notes, f"rlnImageSize {stated} (the stack {urls.name(stack.url)} has {stack.box_size} px)")
        raise InputError(
            f"{urls.redacted(stack.url)}: box {stack.box_size} px, but {where} states {stated} px; give the stacks "
            "that it is about, or correct its box and pixel size"
        )
    return notes


def _check_units(table: ParticleTable, where: str) -> None:
    """Refuse a CTF in other units than the columns': no microscope has such values.

    Raises:
        InputError: volts for kV, or µm for Å.
    """
    if not table.has_ctf:
        return
    voltage = float(table.columns["voltage"].max())
    if voltage > _MOST_KV:
        raise InputError(f"{where}: a voltage of {voltage:g} kV; give kV, not V")
    defocus = max(float(np.abs(table.columns[name]).max()) for name in ("defocus_u", "defocus_v"))
    if 0 < defocus < _LEAST_DEFOCUS:
        raise InputError(f"{where}: no defocus is above {defocus:g} Å; give Å, not µm")


def _compare_pixel_sizes(table: ParticleTable, stacks: tuple[Stack, ...], notes: tuple[str, ...]) -> tuple[str, ...]:
    """Say where a stack's header states another pixel size than the table, whose word counts."""
    stated = table.stack_pixel_sizes or (table.pixel_size,) * len(stacks)
    for stack, size in zip(stacks, stated, strict=True):
        if size and stack.pixel_size and abs(stack.pixel_size / size - 1) > _CLOSE_PIXEL:
            return (*notes, f"{stack.pixel_size:g} Å/px in the header of {urls.name(stack.url)} (the table: {size:g})")
    return notes


def _one_box(stacks: tuple[Stack, ...]) -> int:
    """The common box size of stacks."""
    box_size = stacks[0].box_size
    for stack in stacks:
        if stack.box_size != box_size:
            raise InputError(
                f"{urls.redacted(stack.url)}: box {stack.box_size} px, but {urls.redacted(stacks[0].url)} has "
                f"{box_size} px; rescale or pad them to one box"
            )
    if box_size % 2:
        raise InputError(
            f"{urls.redacted(stacks[0].url)}: box {box_size} px is odd; crop or pad the particles to an even box"
        )
    return box_size


def _one_pixel_size(
    table: ParticleTable, stacks: tuple[Stack, ...], options: ReadOptions, where: str
) -> tuple[ParticleTable, tuple[Stack, ...], tuple[Resampling, ...]]:
    """The table and the stacks in one pixel size, and what was done to each."""
    sizes = table.stack_pixel_sizes
    if not sizes:
        return table, stacks, ()
    if options.mixed_optics == "refuse":
        raise InputError(
            f"{where}: pixel sizes from {min(sizes):g} to {max(sizes):g} Å; rescale the particles to one, or let "
            "--mixed-optics resample do it"
        )
    boxes = [stack.box_size for stack in stacks]
    odd = [stack for stack, box in zip(stacks, boxes, strict=True) if box % 2]
    if odd:
        raise InputError(
            f"{urls.redacted(odd[0].url)}: box {odd[0].box_size} px is odd; crop or pad the particles to an even box"
        )
    plans = plan_resampling(boxes, sizes)
    opened = tuple(resampled(stack, plan) for stack, plan in zip(stacks, plans, strict=True))
    return replace(table, stack_boxes=tuple(boxes)), opened, plans


def _stack_table(stack: Stack, pixel_size: float | None) -> ParticleTable:
    """The table of a bare stack: every image, nothing known about it."""
    rows = np.arange(stack.count)
    zero = np.zeros(stack.count)
    columns = {"stack": zero, "stack_index": rows, "source_row": rows, "optics_group": zero + 1, "half": zero}
    return ParticleTable(pixel_size or stack.pixel_size, (urls.name(stack.url),), columns)


def _stated_pixel_size(table: ParticleTable, asked: float | None, where: str) -> ParticleTable:
    """The table with the pixel size that was asked for, where it does not state another."""
    if asked is None:
        return table
    if not (np.isfinite(asked) and asked > 0):
        raise InputError(f"--pixel-size {asked:g}: a pixel size is positive, in Å")
    stated = table.stack_pixel_sizes or ((table.pixel_size,) if table.pixel_size else ())
    if any(abs(size - asked) > _SAME_PIXEL * asked for size in stated):
        raise InputError(f"{where}: states a pixel size of {stated[0]:g} Å, not {asked:g}; leave out --pixel-size")
    return replace(table, pixel_size=asked, stack_pixel_sizes=())


def read_source(source: str, data_dir: str | None = None, options: ReadOptions | None = None) -> Source:
    """Read a table or a bare stack, open every stack's header, and check that all fits together.

    Args:
        source: `.star`, cryoSPARC's `.cs` or `.csg`, or `.mrcs`/`.mrc`; path or URL.
        data_dir: folder against which the table names its stacks.
        options: options.

    Raises:
        MissingInputError: the source or a stack does not exist.
        InputError: an unknown kind of file, an odd or non-square box, stacks of unlike boxes or pixel sizes, an image
            number past the end of a stack, no particles, or no pixel size anywhere.
    """
    options = options or ReadOptions()
    where = urls.redacted(source)
    star, cs, sign = None, None, None
    notes: tuple[str, ...] = ()
    left_out: dict[int, str] = {}
    stacks: tuple[Stack, ...] = ()
    if options.passthrough and not source.lower().endswith((".cs", ".csg")):
        raise InputError(f"{where}: --passthrough is for cryoSPARC's .cs files")
    if source.lower().endswith(".star"):
        star = text_of(source)
        table = read_star(source, star, options.pixel_size or 0.0, left_out if options.leave_out else None)
        notes = not_applied(StarText(star, where))
    elif source.lower().endswith((".cs", ".csg")):
        rows = csrows.read(source, options.passthrough)
        left_out |= cryosparc.not_finite(rows) if options.leave_out else {}
        good = np.setdiff1d(np.arange(len(rows)), list(left_out))
        table, sign = cryosparc.table_of(rows[good], where), cryosparc.sign_of(rows, where)
        table = replace(table, columns={**table.columns, "source_row": good})
        cs, notes = csrows.encode(rows), csoptics.not_applied(rows)
    elif source.lower().endswith(STACK_ENDINGS):
        stacks = (Stack.open(source),)
        if stacks[0].is_map:
            raise InputError(
                f"{where}: a 3D map of {stacks[0].count}³ voxels by its header (space group 1), not a stack of images; "
                "give a stack, or a table that names its images"
            )
        table = _stack_table(stacks[0], options.pixel_size)
    else:
        raise unknown_kind(source)
    if not len(table):
        raise InputError(f"{where}: holds no particles")
    table = _stated_pixel_size(table, options.pixel_size, where)
    stacks = stacks or open_stacks(table, source, data_dir, options.allow_outside)
    _check_indices(table, stacks, where)
    left = left_out if options.leave_out else None
    notes = _check_boxes(table, stacks, where, notes)
    if options.ctf is not None:
        table = with_ctf(table, options.ctf, [stack.box_size for stack in stacks], where, left)
    _check_units(table, where)
    notes = _compare_pixel_sizes(table, stacks, notes)
    if not table.pixel_size:
        table = replace(table, pixel_size=_header_pixel_size(stacks, where))
    if options.poses is not None:
        table = with_poses(table, options.poses, [stack.box_size for stack in stacks], where, left)
    table, stacks, resampling = _one_pixel_size(table, stacks, options, where)
    return Source(table, stacks, _one_box(stacks), table.pixel_size, star, cs, sign, notes, resampling, left_out)


def _header_pixel_size(stacks: tuple[Stack, ...], where: str) -> float:
    """The pixel size that all stacks' headers state."""
    sizes = [stack.pixel_size for stack in stacks]
    if not sizes[0]:
        raise InputError(
            f"{where}: no pixel size, neither in the table (rlnImagePixelSize) nor in the header of "
            f"{urls.redacted(stacks[0].url)}; add one of them, or give --pixel-size"
        )
    if max(sizes) - min(sizes) > _SAME_PIXEL * max(sizes):
        raise InputError(
            f"{where}: its stacks' headers state pixel sizes from {min(sizes):g} to {max(sizes):g} Å, and the table "
            "none; give --pixel-size"
        )
    return sizes[0]
