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


def _check_count(count: int, table: ParticleTable, name: str, where: str) -> None:
    if count != len(table):
        raise InputError(f"{name}: has {count:,} particles, {where} has {len(table):,}; they do not belong together")


def with_ctf(table: ParticleTable, ctf: str, stack_boxes: Sequence[int], where: str) -> ParticleTable:
    """The table with the CTF given in place of its own.

    Args:
        table: the particles.
        ctf: a cryoDRGN .pkl, or `name=value` pairs of our CTF columns in kV, mm, Å and degrees, for every image.
        stack_boxes: box of every stack, px.
        where: the source's name, for messages.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a CTF, or not of these particles.
    """
    if not ctf.endswith(".pkl"):
        return _replaced(table, {name: np.full(len(table), value) for name, value in _pairs(ctf).items()}, where)
    found = cryodrgn.read_ctf(ctf)
    _check_count(len(found.columns["voltage"]), table, ctf, where)
    # The pixel size belongs to the box beside it: of the same particles in a smaller box it is larger.
    sizes = found.pixel_size * found.box_size / _boxes(table, stack_boxes)
    stated = table.pixel_sizes()
    known = stated > 0
    if (np.abs(sizes - stated)[known] > 1e-3 * stated[known]).any() or np.ptp(sizes):
        raise InputError(
            f"{ctf}: states {found.pixel_size:g} Å at a box of {found.box_size} px, {where} has {stated[0]:g} Å at "
            f"{stack_boxes[0]} px; they do not belong together"
        )
    table = _replaced(table, found.columns, where)
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


def with_poses(table: ParticleTable, poses: str, stack_boxes: Sequence[int], where: str) -> ParticleTable:
    """The table with the poses of a cryoDRGN .pkl in place of its own; its pixel size must be known.

    Raises:
        MissingInputError: there is no such file.
        InputError: not poses, or not of these particles.
    """
    if not poses.endswith(".pkl"):
        raise InputError(f"--poses {poses}: poses are given as cryoDRGN's .pkl; other packages keep them in the table")
    rotation, fraction = cryodrgn.read_poses(poses)
    _check_count(len(rotation), table, poses, where)
    width = _boxes(table, stack_boxes) * table.pixel_sizes()
    return _replaced(table, dict(zip(POSE_COLUMNS, (rotation, fraction * width[:, None]), strict=True)), where)
