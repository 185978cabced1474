"""The particle table: what is known of every particle, in named columns with fixed units.

Units: Å for defocus, shift and pixel size; degrees for angles; kV; mm for spherical aberration. Rotations map the
image frame to the volume frame; shifts say where the content sits relative to the box centre, as (x, y).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.errors import InputError

#: Every column a table may hold: dtype and shape of one row.
COLUMNS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "stack": ("i4", ()),  # which of the table's stacks
    "stack_index": ("i8", ()),  # image in the stack, from 0
    "source_row": ("i8", ()),  # row in the table that was read
    "optics_group": ("i2", ()),
    "micrograph": ("i4", ()),  # counted from 0 as they come; -1 = not known
    "half": ("i1", ()),  # 1 or 2; 0 = not assigned
    "defocus_u": ("f4", ()),  # Å, positive underfocus, U ≥ V
    "defocus_v": ("f4", ()),
    "astigmatism_angle": ("f4", ()),  # degrees from +x to the U axis
    "voltage": ("f4", ()),  # kV
    "spherical_aberration": ("f4", ()),  # mm
    "amplitude_contrast": ("f4", ()),  # fraction
    "phase_shift": ("f4", ()),  # degrees
    "rotation": ("f4", (3, 3)),
    "shift": ("f4", (2,)),  # Å, (x, y)
    # Of images as recorded (`physics.aberrations`); what was stored is not corrected.
    "odd_phase": ("f4", (12,)),  # Zernike coefficients, radians and Å^n
    "even_phase": ("f4", (16,)),
    "magnification": ("f4", (2, 2)),  # from recorded frequencies to the specimen's
}
CTF_COLUMNS = (
    "defocus_u",
    "defocus_v",
    "astigmatism_angle",
    "voltage",
    "spherical_aberration",
    "amplitude_contrast",
    "phase_shift",
)
POSE_COLUMNS = ("rotation", "shift")
ABERRATION_COLUMNS = ("odd_phase", "even_phase", "magnification")
ALWAYS = ("stack", "stack_index", "source_row", "optics_group", "half")

Columns = dict[str, npt.NDArray]

_LARGEST_BOX = 1 << 24
_SAME_PIXEL = 1e-4  # relative; less is rounding
_MOST_SIZES = 32  # in one stack


def _first_bad(values: npt.NDArray, bad: npt.NDArray, name: str, wanted: str) -> None:
    """Raise for the first row where `bad` holds."""
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        raise InputError(f"particle table: {name} of row {row + 1} is {values[row].tolist()}, it must be {wanted}")


class StackPixels:
    """Pixel size and box of every stack's rows, gathered piece by piece.

    A stack that holds images of several pixel sizes counts as several stacks of one name.
    """

    def __init__(self) -> None:
        self._first: dict[int, float] = {}  # pixel size by stack
        self._more: list[tuple[int, float]] = []  # stacks that have another size too, and that size
        self._least: dict[int, float] = {}
        self._most: dict[int, float] = {}

    def add(
        self,
        stack: npt.NDArray[np.integer],
        sizes: npt.NDArray[np.floating],
        boxes: npt.NDArray[np.floating] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Take in some rows: which stack each is in, and its image's pixel size in Å (0: not said) and box in px.

        Returns:
            The stack and pixel size of each row by one number: that of the stack, or -1, -2, … for a further size of
            it; `places` turns these into places in `names`.

        Raises:
            InputError: one stack has too many pixel sizes to be read.
        """
        values, which = np.unique(sizes, return_inverse=True)
        pairs, inverse = np.unique(stack.astype(np.int64) * len(values) + which.reshape(-1), return_inverse=True)
        found = [self._number(pair // len(values), float(values[pair % len(values)])) for pair in pairs.tolist()]
        numbers: npt.NDArray[np.int64] = np.array(found, dtype=np.int64)[inverse.reshape(-1)]
        if boxes is not None:
            for number in np.unique(numbers).tolist():
                own = boxes[numbers == number]
                self._least[number] = min(self._least.get(number, np.inf), float(own.min()))
                self._most[number] = max(self._most.get(number, 0.0), float(own.max()))
        return numbers

    def _number(self, stack: int, size: float) -> int:
        if abs(self._first.setdefault(stack, size) - size) <= _SAME_PIXEL * size:
            return stack
        others = [number for number, (which, _) in enumerate(self._more) if which == stack]
        for number in others:
            if abs(self._more[number][1] - size) <= _SAME_PIXEL * size:
                return -1 - number
        if len(others) >= _MOST_SIZES:
            raise InputError(f"more than {_MOST_SIZES} pixel sizes in one stack; rescale the particles to one")
        self._more.append((stack, size))
        return -len(self._more)

    def _numbers(self) -> list[int]:
        """What stands for each stack in `names`: those with rows, then further pixel sizes of them."""
        return [*sorted(self._first), *range(-1, -1 - len(self._more), -1)]

    def places(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """What `add` returned, as places in `names`; when all rows are in."""
        every = self._numbers()
        place = np.zeros(max(every, default=-1) + 1 + len(self._more), dtype=np.int64)
        place[every] = np.arange(len(every))  # negative ones from the end
        return place[numbers.astype(np.int64)]

    def names(self, stacks: Sequence[str]) -> tuple[str, ...]:
        """Of all stacks those with rows, and once more those with further pixel sizes."""
        return tuple(stacks[number if number >= 0 else self._more[-1 - number][0]] for number in self._numbers())

    def boxes(self) -> tuple[int, ...]:
        """The box of the images of each stack in `names`, px; empty where the table does not say.

        Raises:
            InputError: the rows of one stack differ, or a box is no number of pixels.
        """
        if not any(self._most.values()):
            return ()
        for number in self._numbers():
            least, most = self._least[number], self._most[number]
            if least != most or most != np.floor(most) or most > _LARGEST_BOX:
                raise InputError(f"boxes from {least:g} to {most:g} px in one stack")
        return tuple(int(self._most[number]) for number in self._numbers())

    def sizes(self) -> tuple[float, tuple[float, ...]]:
        """The table's pixel size, and that of each stack in `names` where they differ (`ParticleTable`)."""
        every = [self._first[number] if number >= 0 else self._more[-1 - number][1] for number in self._numbers()]
        if not every:
            return 0.0, ()
        largest = max(every)
        if largest - min(every) <= _SAME_PIXEL * largest:
            return every[0], ()
        return largest, tuple(every)


def dense_groups(groups: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Group numbers as they are, or counted from 1 where the column could not hold them."""
    if len(groups) and groups.max() > np.iinfo(COLUMNS["optics_group"][0]).max:
        return np.unique(groups, return_inverse=True)[1] + 1
    return groups


def _as_stored(values: npt.NDArray, name: str, dtype: str) -> npt.NDArray:
    """Values in the column's dtype; a number that does not fit an integer column is refused, not wrapped around."""
    wide = np.asarray(values)
    if np.dtype(dtype).kind == "i" and wide.dtype != np.dtype(dtype):
        limits = np.iinfo(dtype)
        with np.errstate(invalid="ignore"):
            bad = ~((wide >= limits.min) & (wide <= limits.max))
        _first_bad(wide, bad, name, f"between {limits.min} and {limits.max}")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(wide, dtype=dtype)


@dataclass(frozen=True)
class ParticleTable:
    """N particles: one pixel size, the stacks that hold them, and columns of length N (`COLUMNS`).

    The CTF columns are all present or all absent (`has_ctf`), and so are rotation and shift (`has_pose`) and those of
    aberrations, which are there only where they do something.
    Where U < V the two are swapped and the astigmatism angle turned by 90°.

    Args:
        pixel_size: Å; 0 when the table does not say. Where stacks differ, that of the coarsest.
        stacks: names of the image stacks, as the source gives them; one with images of several pixel sizes stands here
            once for each.
        columns: arrays by name; converted to the dtypes of `COLUMNS`.
        stack_pixel_sizes: Å of every stack, where they differ; empty where all have `pixel_size`.
        stack_boxes: box that the table states for the images of every stack, px; empty where it does not say.

    Raises:
        InputError: a column is missing, of the wrong shape, not finite, or out of range.
    """

    pixel_size: float
    stacks: tuple[str, ...]
    columns: Columns
    stack_pixel_sizes: tuple[float, ...] = ()
    stack_boxes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (np.isfinite(self.pixel_size) and self.pixel_size >= 0):
            raise InputError(f"particle table: pixel size {self.pixel_size} Å is not a positive number")
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise InputError(f"particle table: unknown columns {', '.join(unknown)}")
        for group in (ALWAYS, CTF_COLUMNS, POSE_COLUMNS, ABERRATION_COLUMNS):
            missing = [name for name in group if name not in self.columns]
            if missing and (group is ALWAYS or len(missing) < len(group)):
                raise InputError(f"particle table: missing columns {', '.join(missing)}")
        if self.stack_pixel_sizes and len(self.stack_pixel_sizes) != len(self.stacks):
            raise InputError(f"particle table: {len(self.stack_pixel_sizes)} pixel sizes for {len(self.stacks)} stacks")
        count = len(self.columns["stack"])
        converted: Columns = {}
        for name, (dtype, shape) in COLUMNS.items():
            if name in self.columns:
                values = _as_stored(self.columns[name], name, dtype)
                if values.shape != (count, *shape):
                    raise InputError(f"particle table: {name} has shape {values.shape}, not {(count, *shape)}")
                converted[name] = values
        object.__setattr__(self, "columns", converted)
        self._validate()

    def _validate(self) -> None:
        columns = self.columns
        for name, values in columns.items():
            if values.dtype.kind == "f":
                _first_bad(values, ~np.isfinite(values), name, "finite")
        stack = columns["stack"]
        _first_bad(stack, (stack < 0) | (stack >= len(self.stacks)), "stack", f"below {len(self.stacks)}")
        _first_bad(columns["stack_index"], columns["stack_index"] < 0, "stack index", "0 or more")
        _first_bad(columns["half"], (columns["half"] < 0) | (columns["half"] > 2), "half", "0, 1 or 2")
        if not self.has_ctf:
            return
        _first_bad(columns["voltage"], columns["voltage"] <= 0, "voltage", "positive (kV)")
        contrast = columns["amplitude_contrast"]
        _first_bad(contrast, (contrast < 0) | (contrast > 1), "amplitude contrast", "between 0 and 1")
        swap = columns["defocus_u"] < columns["defocus_v"]
        if swap.any():
            u, v = columns["defocus_u"], columns["defocus_v"]
            angle = columns["astigmatism_angle"]
            columns["defocus_u"], columns["defocus_v"] = np.maximum(u, v), np.minimum(u, v)
            columns["astigmatism_angle"] = np.where(swap, angle + np.float32(90), angle)

    def __len__(self) -> int:
        return len(self.columns["stack"])

    @property
    def has_ctf(self) -> bool:
        """Whether the CTF columns are there."""
        return "defocus_u" in self.columns

    @property
    def has_pose(self) -> bool:
        """Whether rotation and shift are there."""
        return "rotation" in self.columns

    @property
    def has_aberrations(self) -> bool:
        """Whether the columns of odd and even phases and of magnification are there."""
        return "magnification" in self.columns

    def select(self, rows: npt.NDArray[np.integer] | slice) -> "ParticleTable":
        """The table of some rows; stacks are kept as they are."""
        picked = {name: values[rows] for name, values in self.columns.items()}
        return ParticleTable(self.pixel_size, self.stacks, picked, self.stack_pixel_sizes, self.stack_boxes)

    def pixel_sizes(self) -> npt.NDArray[np.float64]:
        """Pixel size of every particle's image in its stack, Å; 0 where the table does not say."""
        if not self.stack_pixel_sizes:
            return np.full(len(self), self.pixel_size)
        return np.array(self.stack_pixel_sizes)[self.columns["stack"]]

    def image_names(self) -> list[str]:
        """RELION's name of every image: `000001@stack`, counted from 1."""
        index, stack = self.columns["stack_index"], self.columns["stack"]
        return [f"{i + 1:06d}@{self.stacks[s]}" for i, s in zip(index.tolist(), stack.tolist(), strict=True)]
