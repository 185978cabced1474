"""RELION's particle tables as this package's columns, and as poses.

RELION 3.0 (optics in every row, pixel size by magnification) and 3.1 to 5 (optics groups) are read; 3.1 is written.
RELION's origin is minus our shift; its angles (rot, tilt, psi) make our rotation by `physics.rotation`.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.aberrations import aberration_columns, without_idle
from scalecryo.data.formats.relion.syntax import StarText, Text
from scalecryo.data.formats.relion.values import (
    ANGLES,
    DEFOCUS,
    HALF,
    MAX_CONFIDENCE,
    OPTICS,
    ORIGINS,
    ORIGINS_PX,
    Floats,
    Values,
    pieces,
    split_names,
    without_format,
)
from scalecryo.data.formats.rotations import euler_to_matrix
from scalecryo.data.formats.spill_columns import SpillColumns
from scalecryo.data.io import urls
from scalecryo.data.particles import ALWAYS, COLUMNS, POSE_COLUMNS, Columns, ParticleTable, StackPixels, dense_groups
from scalecryo.errors import InputError

# What would make every image disagree with its CTF, or is no single particle image, and how to come by one.
_REFUSED = {
    "rlnCtfDataAreCtfPremultiplied": (1, "the images are CTF-premultiplied; extract them again without"),
    "rlnCtfDataArePhaseFlipped": (1, "the images are phase-flipped; extract them again without"),
    "rlnImageDimensionality": (3, "the images are volumes; give 2D particles"),
}
_BOX = "rlnImageSize"
_MICROGRAPH = "rlnMicrographName"


class StarPoses(NamedTuple):
    """Poses of a table, row by row, in double precision.

    Args:
        names: image names, `i@stack`.
        rotation: (N, 3, 3), image frame to volume frame.
        shift: (N, 2) Å, where the content sits, (x, y); None when the file has no origins.
        half: 1 or 2, 0 where not assigned.
        confidence: 0 to 1; None when the file has none.
    """

    names: list[str]
    rotation: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64] | None
    half: npt.NDArray[np.int8]
    confidence: npt.NDArray[np.float64] | None


def _ctf_columns(values: Values) -> Columns:
    """The CTF columns, or none when the file has no defocus."""
    if not any(name in values for name in DEFOCUS.values()):
        return {}
    values.require(list(DEFOCUS.values()), "the CTF needs both defoci and their angle")
    values.require(list(OPTICS.values()), "the CTF needs it and defocus is given")
    columns: Columns = {ours: values.numbers(theirs) for ours, theirs in {**DEFOCUS, **OPTICS}.items()}
    phase = "rlnPhaseShift"
    columns["phase_shift"] = values.numbers(phase) if phase in values else np.zeros(len(values))
    return columns


def _has_angles(values: Values) -> bool:
    """Whether rows have all three angles; psi alone, as after 2D classification, is no pose."""
    present = [name in values for name in ANGLES]
    if any(present[:2]) and not all(present):
        values.require(ANGLES, "a pose has three angles")
    return all(present)


def is_tilted(values: Values) -> bool:
    """Whether any of some rows is seen from elsewhere than the z axis; none is in a table of 2D classes."""
    return any(bool(values.numbers(name).any()) for name in ANGLES[:2] if name in values)


def _rotation(values: Values) -> Floats:
    return euler_to_matrix(np.stack([values.numbers(name) for name in ANGLES], axis=-1))


def _shift(values: Values, pixel_sizes: Floats) -> Floats | None:
    """Shift in Å: minus RELION's origin; None where the file has no origins."""
    for names, in_pixels in ((ORIGINS, False), (ORIGINS_PX, True)):
        present = [name in values for name in names]
        if any(present):
            values.require(names, "an origin has x and y")
            origin = np.stack([values.numbers(name) for name in names], axis=-1)
            if not in_pixels:
                return -origin
            if origin.any() and not pixel_sizes.all():
                raise InputError(
                    f"{values.where}: origins are in pixels but there is no pixel size; add rlnImagePixelSize"
                )
            return -origin * pixel_sizes[:, None]
    return None


def _half(values: Values) -> Floats:
    if HALF not in values:
        return np.zeros(len(values))
    subset = values.numbers(HALF)
    return np.where(np.isin(subset, (1, 2)), subset, 0)


def _refuse(values: Values) -> None:
    for name, (refused, why) in _REFUSED.items():
        if name in values and (values.numbers(name) == refused).any():
            raise InputError(f"{values.where}: {name} is {refused}: {why}")


def _piece_columns(
    values: Values, stacks: dict[bytes, int], micrographs: dict[bytes, int], pixel_size: float
) -> tuple[Columns, Floats]:
    """Our columns of some rows, in the dtypes of the table, and their pixel sizes."""
    _refuse(values)
    sizes = values.pixel_sizes()
    stack, index = split_names(values.rows, stacks)
    ctf = _ctf_columns(values)
    columns: Columns = {
        "stack": np.array(stack, dtype=np.int64),
        "stack_index": np.array(index, dtype=np.int64),
        "source_row": values.rows.first + np.arange(len(values)),
        "optics_group": values.groups(),
        "half": _half(values),
        **ctf,
        **aberration_columns(values, ctf),
    }
    if _MICROGRAPH in values:
        own = [micrographs.setdefault(name, len(micrographs)) for name in values.strings(_MICROGRAPH)]
        columns["micrograph"] = np.array(own, dtype=np.int32)
    if _has_angles(values):
        shift = _shift(values, np.where(sizes > 0, sizes, pixel_size))
        columns["rotation"] = _rotation(values)
        columns["shift"] = np.zeros((len(values), 2)) if shift is None else shift
    with np.errstate(over="ignore"):  # the table refuses what becomes infinite
        small = {name: array.astype(COLUMNS[name][0]) for name, array in columns.items() if array.dtype.kind == "f"}
    return {**columns, **small}, sizes


def read_particles(
    url: str, text: Text | None = None, pixel_size: float = 0.0, bad: dict[int, str] | None = None
) -> ParticleTable:
    """The particle table of a STAR file.

    Poses are taken when the file has all three angles, and rot and tilt are not 0 throughout as after a 2D
    classification; shifts are 0 where it has no origins. Columns that this package
    has no use for are left in the file.

    Args:
        url: the file.
        text: its content, when it has been read.
        pixel_size: Å, for origins in pixels where the file does not say.
        bad: gains the rows with nan or inf, and what is so, which are then left out; None: they are an error.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a STAR file, not a particle table, or a column missing or not numeric.
    """
    star = StarText.open(url) if text is None else StarText(text, urls.redacted(url))
    stacks: dict[bytes, int] = {}
    micrographs: dict[bytes, int] = {}
    pixels = StackPixels()
    growing = SpillColumns()
    tilted = False
    for values in pieces(star, bad):
        columns, sizes = _piece_columns(values, stacks, micrographs, pixel_size)
        tilted = tilted or is_tilted(values)
        boxes = values.numbers(_BOX) if _BOX in values else None
        if bad:
            keep = ~np.isin(columns["source_row"], list(bad))
            columns, sizes = {name: column[keep] for name, column in columns.items()}, sizes[keep]
            boxes = None if boxes is None else boxes[keep]
        try:
            columns["stack"] = pixels.add(columns["stack"], sizes, boxes)
        except InputError as error:
            raise InputError(f"{star.where}: {error}") from error
        growing.add(columns)
    try:
        stated, by_stack = pixels.sizes()
        names = pixels.names([stack.decode() for stack in stacks])
        whole = growing.whole() or {name: np.zeros(0) for name in ALWAYS}
        whole["stack"] = pixels.places(whole["stack"])
        if not tilted:
            whole = {name: values for name, values in whole.items() if name not in POSE_COLUMNS}
        whole["optics_group"] = dense_groups(whole["optics_group"])
        return ParticleTable(stated, names, without_idle(whole), by_stack, pixels.boxes())
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{star.where}: {error}") from error


class OwnColumns:
    """Any column of a particle table as numbers, by RELION's name, those of its optics groups included."""

    def __init__(self, text: Text, where: str) -> None:
        self._text = StarText(text, where)
        first = next(pieces(self._text))
        self.names = first.names()

    def numbers(self, name: str) -> Floats:
        """One column; nan and inf are numbers here.

        Raises:
            InputError: it holds something else.
        """
        return np.concatenate([values.numbers(name, finite=False) for values in pieces(self._text)])

    def strings(self, name: str) -> list[bytes]:
        """One column as text."""
        return [value for values in pieces(self._text) for value in values.strings(name)]


def image_key(name: str) -> tuple[int, str]:
    """Index and bare file name of an image: tables that name the stack's folder differently still match."""
    index, _, stack = name.partition("@")
    return int(index), urls.name(without_format(stack.encode()).decode())


def read_poses(url: str) -> StarPoses:
    """Image names, rotations, shifts, halves and confidences of a STAR file.

    Raises:
        MissingInputError, InputError: as `read_particles`, or the file has no angles.
    """
    text = StarText.open(url)
    names: list[str] = []
    rotation, half = [np.zeros((0, 3, 3))], [np.zeros(0)]
    shift: list[Floats] = []
    confidence: list[Floats] = []
    for values in pieces(text):
        values.require(ANGLES, "poses were asked for")
        split_names(values.rows, {})
        names += [name.decode(errors="replace") for name in values.rows.strings("rlnImageName")]
        rotation.append(_rotation(values))
        half.append(_half(values))
        moved = _shift(values, values.pixel_sizes())
        shift += [] if moved is None else [moved]
        confidence += [values.numbers(MAX_CONFIDENCE)] if MAX_CONFIDENCE in values else []
    return StarPoses(
        names,
        np.concatenate(rotation),
        np.concatenate(shift) if shift else None,
        np.concatenate(half).astype(np.int8),
        np.concatenate(confidence) if confidence else None,
    )
