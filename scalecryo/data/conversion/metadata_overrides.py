"""CTF and poses that are given beside a table or stack: cryoDRGN's pickles, or values on the command line."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats import cryodrgn
from scalecryo.data.particles import CTF_COLUMNS, POSE_COLUMNS, Columns, ParticleTable
from scalecryo.errors import InputError

_NEEDED = ("voltage", "spherical_aberration", "amplitude_contrast", "defocus_u")
_EXAMPLE = "voltage=300,spherical_aberration=2.7,amplitude_contrast=0.1,defocus_u=15000"


def _boxes(table: ParticleTable, stack_boxes: Sequence[int]) -> npt.NDArray[np.float64]:
    """Box size of every particle's image, px."""
    return np.array(stack_boxes, dtype=np.float64)[table.columns["stack"]]


def _rows_of(
    count: int, table: ParticleTable, name: str, where: str, left_out: dict[int, str] | None
) -> npt.NDArray[np.integer]:
    """Which of a file's rows, one for each particle of the source, belong to the table's: some may be left out."""
    every = len(table) + len(left_out or {})
    if count == every:
        return table.columns["source_row"]
    raise InputError(f"{name}: has {count:,} particles, {where} has {every:,}; they do not belong together")


def _without(table: ParticleTable, bad: dict[int, str], left_out: dict[int, str] | None) -> ParticleTable:
    """The table without bad rows of the source, which `left_out` gains."""
    if left_out is None or not bad:
        return table
    keep = ~np.isin(table.columns["source_row"], list(bad))
    left_out |= {row: bad[row] for row in table.columns["source_row"][~keep].tolist()}
    if not keep.any():
        raise InputError(f"no particle is left: {next(iter(bad.values()))} in all of them")
    return table.select(np.flatnonzero(keep))


def with_ctf(
    table: ParticleTable, ctf: str, stack_boxes: Sequence[int], where: str, left_out: dict[int, str] | None = None
) -> ParticleTable:
    """The table with the CTF given in place of its own.

    Args:
        table: the particles.
        ctf: a cryoDRGN .pkl, or `name=value` pairs of our CTF columns in kV, mm, Å and degrees, for every image.
        stack_boxes: box of every stack, px.
        where: the source's name, for messages.
        left_out: rows of the source that the table is without, and why; gains those without a CTF. None: these are an
            error.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a CTF, or not of these particles.
    """
    if not ctf.endswith(".pkl"):
        return _replaced(table, {name: np.full(len(table), value) for name, value in _pairs(ctf).items()}, where)
    bad: dict[int, str] = {}
    found = cryodrgn.read_ctf(ctf, None if left_out is None else bad)
    _rows_of(len(found.columns["voltage"]), table, ctf, where, left_out)
    table = _without(table, bad, left_out)
    rows = _rows_of(len(found.columns["voltage"]), table, ctf, where, left_out)
    # The pixel size belongs to the box beside it: of the same particles in a smaller box it is larger.
    sizes = found.pixel_size * found.box_size / _boxes(table, stack_boxes)
    stated = table.pixel_sizes()
    known = stated > 0
    if (np.abs(sizes - stated)[known] > 1e-3 * stated[known]).any() or np.ptp(sizes):
        raise InputError(
            f"{ctf}: states {found.pixel_size:g} Å at a box of {found.box_size} px, {where} has {stated[0]:g} Å at "
            f"{stack_boxes[0]} px; they do not belong together"
        )
    table = _replaced(table, {name: values[rows] for name, values in found.columns.items()}, where)
    return table if known.all() else replace(table, pixel_size=float(sizes[0]))


def _replaced(table: ParticleTable, columns: Columns, where: str) -> ParticleTable:
    kept = {name: values for name, values in table.columns.items() if name not in columns}
    try:
        return replace(table, columns=kept | columns)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _pairs(text: str) -> dict[str, float]:
    """The CTF of `name=value` pairs; a defocus alone is both, other values left out are 0."""
    values: dict[str, float] = {}
    for pair in text.split(","):
        name, equals, value = pair.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if name not in CTF_COLUMNS or not equals or not np.isfinite(number) or name in values:
            raise InputError(f"--ctf: {pair.strip()!r} is not understood; give a .pkl, or values such as {_EXAMPLE}")
        values[name] = number
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise InputError(f"--ctf: lacks {', '.join(missing)}; give values such as {_EXAMPLE}")
    values.setdefault("defocus_v", values["defocus_u"])
    return {name: values.get(name, 0.0) for name in CTF_COLUMNS}


def with_poses(
    table: ParticleTable, poses: str, stack_boxes: Sequence[int], where: str, left_out: dict[int, str] | None = None
) -> ParticleTable:
    """The table with the poses of a cryoDRGN .pkl in place of its own; its pixel size must be known. See `with_ctf`.

    Raises:
        MissingInputError: there is no such file.
        InputError: not poses, or not of these particles.
    """
    if not poses.endswith(".pkl"):
        raise InputError(f"--poses {poses}: poses are given as cryoDRGN's .pkl; other packages keep them in the table")
    bad: dict[int, str] = {}
    rotation, fraction = cryodrgn.read_poses(poses, None if left_out is None else bad)
    _rows_of(len(rotation), table, poses, where, left_out)
    table = _without(table, bad, left_out)
    rows = _rows_of(len(rotation), table, poses, where, left_out)
    width = _boxes(table, stack_boxes) * table.pixel_sizes()
    return _replaced(
        table, dict(zip(POSE_COLUMNS, (rotation[rows], fraction[rows] * width[:, None]), strict=True)), where
    )
