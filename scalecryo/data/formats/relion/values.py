"""What a row of RELION's particle table says, its optics group's part included.

RELION 3.0 keeps optics in every row, 3.1 to 5 in a table of groups, in any order of the blocks. A row's own column goes
before its group's.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import Block, Rows, StarText, small_table
from scalecryo.errors import InputError

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
ORIGINS_PX = ("rlnOriginX", "rlnOriginY")
#: Our column and RELION's; the first three differ by row, the rest belong to the optics.
DEFOCUS = {"defocus_u": "rlnDefocusU", "defocus_v": "rlnDefocusV", "astigmatism_angle": "rlnDefocusAngle"}
OPTICS = {
    "voltage": "rlnVoltage",
    "spherical_aberration": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
MAX_CONFIDENCE = "rlnMaxValueProbDistribution"
CLASS = "rlnClassNumber"
CLASS_PROBABILITY = "scalecryoClassProbability"
COMPONENT = "scalecryoComponent"  # and its number: the coordinate, in standard deviations
STATE, STATE_PROBABILITY = "scalecryoState", "scalecryoStateProbability"
HALF = "rlnRandomSubset"
GROUP = "rlnOpticsGroup"
PARTICLE_ID = "rlnParticleId"
#: What simulation says of an image: 0 a particle, 1 nothing, 2 another object. RELION keeps columns it does not know.
JUNK = "scalecryoJunk"
IMAGE_NAME = "rlnImageName"
_LONGEST_NUMBER = 12
_NO_TOMOGRAPHY = (
    "a table of subtomograms or tilt series ({}): only 2D images of single particles can be used here; reconstruct "
    "these with the program that wrote the table"
)
_TOMOGRAPHY = ("rlnTomo",)
_VOLUMES = ("rlnCoordinateZ", "rlnCtfImage")  # beside the name of a file that is no stack
_FORMATS = (b"mrcs", b"mrc")
#: Columns of aberrations, and what they come to where they do nothing (`_digits`).
_ABERRATIONS = {
    "rlnBeamTiltX": b"",
    "rlnBeamTiltY": b"",
    "rlnOddZernike": b"",
    "rlnEvenZernike": b"",
    "rlnMagMat00": b"1",
    "rlnMagMat01": b"",
    "rlnMagMat10": b"",
    "rlnMagMat11": b"1",
}
_ENVELOPES = {"rlnCtfBfactor": b"", "rlnCtfScalefactor": b"1"}

Floats = npt.NDArray[np.float64]


def particle_block(text: StarText) -> Block:
    """The block that lists images.

    Raises:
        InputError: there is none.
    """
    if any(block.name == "model_general" for block in text.blocks):
        raise InputError(f"{text.where}: a RELION model file, not a particle table; give the run's …_data.star")
    tomo = [name for block in text.blocks for name in block.columns if name.startswith(_TOMOGRAPHY)]
    if tomo:
        raise InputError(f"{text.where}: {_NO_TOMOGRAPHY.format(tomo[0])}")
    found = [block for block in text.blocks if block.name != "optics" and IMAGE_NAME in block.columns]
    if not found:
        raise InputError(f"{text.where}: no block has the column rlnImageName; give a particle table")
    return next((block for block in found if block.name == "particles"), found[0])


@dataclass(frozen=True)
class Optics:
    """The optics groups of a table: their numbers, and every other column by name."""

    groups: npt.NDArray[np.int64]
    columns: dict[str, list[bytes]] = field(repr=False)
    where: str

    @classmethod
    def read(cls, text: StarText) -> "Optics | None":
        """The optics table; None when there is none.

        Raises:
            InputError: it has no group numbers, or one twice.
        """
        block = next((block for block in text.blocks if block.name == "optics"), None)
        if block is None:
            return None
        columns = dict(small_table(text, block))
        if GROUP not in columns:
            raise InputError(
                f"{text.where}: column {GROUP} is missing in data_optics (every optics group has a number); "
                "add it to the file"
            )
        # Some programs write 1.0.
        groups = [_whole(re.sub(rb"\.0*$", b"", value)) for value in columns.pop(GROUP)]
        if -1 in groups:
            raise InputError(f"{text.where}: data_optics names a group that is not a whole number from 0")
        if len(set(groups)) < len(groups):
            raise InputError(f"{text.where}: data_optics describes an optics group twice")
        if not groups:
            raise InputError(f"{text.where}: data_optics describes no optics group")
        return cls(np.array(groups, dtype=np.int64), columns, text.where)

    def numbers(self, name: str) -> Floats:
        """A column as finite numbers, one for each group."""
        out = np.empty(len(self.groups))
        for row, value in enumerate(self.columns[name]):
            try:
                out[row] = float(value)
            except ValueError:
                out[row] = np.nan
            if not np.isfinite(out[row]):
                shown = value[:40].decode(errors="replace")
                raise InputError(f"{self.where}: {name} of optics group {self.groups[row]} is {shown!r}, not a number")
        return out

    def places(self, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which line of the optics table describes each of some group numbers."""
        order = np.argsort(self.groups)
        place = order[np.minimum(np.searchsorted(self.groups, groups, sorter=order), len(order) - 1)]
        unknown = self.groups[place] != groups
        if unknown.any():
            raise InputError(
                f"{self.where}: optics group {groups[unknown][0]} is used by a particle but not described in "
                "data_optics"
            )
        return place


def _whole(value: bytes) -> int:
    """A whole number from 0; −1 where the text is none."""
    return int(value) if value.isdigit() and len(value) <= _LONGEST_NUMBER else -1


class Values:
    """Numbers of some rows, by RELION's name."""

    def __init__(self, rows: Rows, optics: Optics | None, bad: dict[int, str] | None = None) -> None:
        """
        Args:
            rows: of a piece of the table.
            optics: its groups.
            bad: gains the rows with nan or inf in a column that is asked for, and which; None: they are an error.
        """
        self.rows = rows
        self._bad = bad
        self.where = rows.where
        self._optics = optics
        self._place: npt.NDArray[np.int64] | None = None
        if optics is not None:
            self._place = optics.places(self.groups())

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: str) -> bool:
        return name in self.rows.columns or (self._optics is not None and name in self._optics.columns)

    def names(self) -> tuple[str, ...]:
        """Columns of the rows, and of their optics groups."""
        optics = () if self._optics is None else tuple(self._optics.columns)
        return tuple(dict.fromkeys((*self.rows.columns, *optics)))

    def groups(self) -> npt.NDArray[np.int64]:
        """Optics group of every row.

        Raises:
            InputError: one is no whole number, or rows do not say which of several they belong to.
        """
        if GROUP in self.rows.columns:
            values = self.rows.numbers(GROUP)
            bad = (values < 0) | (values != np.floor(values)) | (values >= 1e12)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise InputError(
                    f"{self.where}: {GROUP} of row {self.rows.first + row + 1} is {values[row]:g}, not a group's number"
                )
            return values.astype(np.int64)
        if self._optics is not None and len(self._optics.groups) > 1:
            raise InputError(
                f"{self.where}: column {GROUP} is missing (there are {len(self._optics.groups)} optics groups); "
                "add it to the file"
            )
        first = 1 if self._optics is None else int(self._optics.groups[0])
        return np.full(len(self), first, dtype=np.int64)

    def numbers(self, name: str, *, finite: bool = True) -> Floats:
        """A column as numbers, `finite` ones unless nan and inf are asked for too.

        Raises:
            InputError: one is not.
        """
        if name in self.rows.columns:
            values = self.rows.numbers(name, finite=finite and self._bad is None)
            if finite and self._bad is not None:
                with np.errstate(over="ignore"):
                    bad = ~np.isfinite(values.astype(np.float32))
                for row in np.flatnonzero(bad).tolist():
                    self._bad.setdefault(self.rows.first + row, f"{name} is {values[row]:g}")
                values = np.where(bad, 1.0, values)  # the row is left out by whoever keeps the list
            return values
        assert self._optics is not None
        assert self._place is not None
        return self._optics.numbers(name)[self._place]

    def lists(self, name: str, width: int) -> Floats:
        """A column of lists of numbers, such as `[0,0,1.5]`, filled up with zeros.

        Raises:
            InputError: one holds something else, or more than `width` numbers that are not zero.
        """
        if name in self.rows.columns:
            texts, place = np.unique(np.array(self.rows.strings(name)), return_inverse=True)
        else:
            assert self._optics is not None
            assert self._place is not None
            texts, place = np.array(self._optics.columns[name]), self._place
        out = np.zeros((len(texts), width))
        for row, text in enumerate(texts.tolist()):
            shown = text[:40].decode(errors="replace")
            try:
                numbers = np.array([float(part) for part in text.strip(b"[]").split(b",") if part.strip()])
            except ValueError:
                numbers = np.array([np.nan])
            if not np.isfinite(numbers).all():
                raise InputError(f"{self.where}: {name} is {shown!r}, not a list of numbers; correct the table")
            if numbers[width:].any():
                raise InputError(
                    f"{self.where}: {name} has {len(numbers)} coefficients, at most {width} are known here; fit "
                    "aberrations again to a lower order"
                )
            out[row, : len(numbers)] = numbers[:width]
        return out[place.reshape(-1)]

    def strings(self, name: str) -> list[bytes]:
        """A column as text."""
        if name in self.rows.columns:
            return self.rows.strings(name)
        assert self._optics is not None
        assert self._place is not None
        values = self._optics.columns[name]
        return [values[place] for place in self._place.tolist()]

    def require(self, names: Sequence[str], why: str) -> None:
        """Raise where columns are missing."""
        missing = [name for name in names if name not in self]
        if missing:
            raise InputError(f"{self.where}: column {', '.join(missing)} is missing ({why}); add it to the file")

    def pixel_sizes(self) -> Floats:
        """Å of every row; 0 when the file has none.

        Raises:
            InputError: one is not positive.
        """
        if "rlnImagePixelSize" in self:
            sizes = self.numbers("rlnImagePixelSize")
        elif "rlnMagnification" in self and "rlnDetectorPixelSize" in self:
            # RELION ≤ 3.0: detector pixel in µm.
            with np.errstate(divide="ignore", invalid="ignore"):
                sizes = 1e4 * self.numbers("rlnDetectorPixelSize") / self.numbers("rlnMagnification")
        elif "rlnPixelSize" in self:
            sizes = self.numbers("rlnPixelSize")
        else:
            return np.zeros(len(self))
        bad = ~(np.isfinite(sizes) & (sizes > 0))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"{self.where}: pixel size {sizes[row]:g} Å of row {self.rows.first + row + 1}; it must be positive"
            )
        return sizes


def without_format(stack: bytes) -> bytes:
    """A stack's file name without the format that RELION, Scipion and Xmipp may put behind it, as in `a.mrc:mrcs`."""
    name, colon, format = stack.rpartition(b":")
    return name if colon and name and format.lower() in _FORMATS else stack


def with_format(image: str) -> str:
    """An image's name that RELION opens: of stacks it takes `.mrcs`, and others with their format behind the name."""
    return image if image.lower().endswith((".mrcs", ".gz", ".bz2")) else f"{image}:mrcs"


def split_names(rows: Rows, stacks: dict[bytes, int]) -> tuple[list[int], list[int]]:
    """Which stack and which image, from 0, every row names; `stacks` gains those not met before.

    Raises:
        InputError: a name does not read `number@stack`.
    """
    which, index = [], []
    for row, value in enumerate(rows.strings(IMAGE_NAME)):
        number, at, stack = value.partition(b"@")
        image = _whole(number)
        if not at and (volumes := [name for name in _VOLUMES if name in rows.columns]):
            raise InputError(f"{rows.where}: {_NO_TOMOGRAPHY.format(volumes[0])}")
        if image < 1 or not at or not stack:
            shown = value[:80].decode(errors="replace")
            raise InputError(
                f"{rows.where}: rlnImageName of row {rows.first + row + 1} is {shown!r}; it must read number@stack, "
                "numbers from 1"
            )
        which.append(stacks.setdefault(without_format(stack), len(stacks)))
        index.append(image - 1)
    return which, index


def not_applied(text: StarText) -> tuple[str, ...]:
    """What a table says of its images that nothing here applies: envelopes and scales that are not zero (or not one),
    aberrations and magnification where there is no CTF, and angles in the plane alone, which are no poses."""
    optics = Optics.read(text)
    found = {} if optics is None else dict(optics.columns)
    block = particle_block(text)
    has_ctf = any(name in block.columns or name in found for name in DEFOCUS.values())
    plain = _ENVELOPES if has_ctf else _ENVELOPES | _ABERRATIONS
    own = [name for name in plain if name in block.columns]
    plane = ANGLES[2] in block.columns
    turned = False
    for values in pieces(text):
        if not own and (not plane or turned):
            break
        for name in own:
            # One value that says something is enough.
            found[name] = [value for value in values.rows.strings(name) if _digits(value) != plain[name]][:1]
        own = [name for name in own if not found[name]]
        if plane and not turned:
            tilted = any(any(map(_digits, values.strings(name))) for name in ANGLES[:2] if name in values)
            plane, turned = not tilted, not tilted and any(map(_digits, values.strings(ANGLES[2])))
    names = [name for name, nothing in plain.items() if any(_digits(v) != nothing for v in found.get(name, []))]
    return (*names, f"{ANGLES[2]} (of a 2D classification: no poses)") if plane and turned else tuple(names)


def _digits(value: bytes) -> bytes:
    """What is left of a number, or of a list of numbers, without signs, points and zeros: nothing, of zero."""
    return value.translate(None, b"+-.0eE[], \t")


def pieces(text: StarText, bad: dict[int, str] | None = None) -> Iterator[Values]:
    """The particles of a table, some rows at a time; `bad` gains those with nan or inf, where it is given."""
    optics = Optics.read(text)
    for rows in text.rows(particle_block(text)):
        yield Values(rows, optics, bad)
