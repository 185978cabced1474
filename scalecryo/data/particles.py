"""The particle table: what is known of every particle, in named columns with fixed units.

Units: Å for defocus, shift and pixel size; degrees for angles; kV; mm for spherical aberration. Rotations map the
image frame to the volume frame; shifts say where the content sits relative to the box centre, as (x, y).
"""

from collections.abc import Mapping
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


def _first_bad(values: npt.NDArray, bad: npt.NDArray, name: str, wanted: str) -> None:
    """Raise for the first row where `bad` holds."""
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        raise InputError(f"particle table: {name} of row {row + 1} is {values[row].tolist()}, it must be {wanted}")


class StackPixels:
    """Smallest and largest pixel size and box of every stack's rows, gathered piece by piece."""

    def __init__(self) -> None:
        self._low, self._high = np.empty(0), np.empty(0)
        self._least, self._most = np.empty(0), np.empty(0)

    def add(
        self,
        stack: npt.NDArray[np.integer],
        sizes: npt.NDArray[np.floating],
        boxes: npt.NDArray[np.floating] | None = None,
    ) -> None:
        """Take in some rows: which stack each is in, and its image's pixel size in Å (0: not said) and box in px."""
        grow = max(0, int(stack.max(initial=-1)) + 1 - len(self._low))
        self._low, self._least = (np.append(values, np.full(grow, np.inf)) for values in (self._low, self._least))
        self._high, self._most = (np.append(values, np.zeros(grow)) for values in (self._high, self._most))
        for lowest, highest, values in ((self._low, self._high, sizes), (self._least, self._most, boxes)):
            if values is not None:
                np.minimum.at(lowest, stack, values)
                np.maximum.at(highest, stack, values)

    def boxes(self) -> tuple[int, ...]:
        """The box of each stack's images, px; empty where the table does not say.

        Raises:
            InputError: the rows of one stack differ, or a box is no number of pixels.
        """
        if not self._most.any():
            return ()
        bad = (self._least != self._most) | (self._most != np.floor(self._most)) | (self._most > _LARGEST_BOX)
        if bad.any():
            stack = int(np.flatnonzero(bad)[0])
            raise InputError(f"boxes from {self._least[stack]:g} to {self._most[stack]:g} px in one stack")
        return tuple(int(box) for box in self._most)

    def sizes(self) -> tuple[float, tuple[float, ...]]:
        """The table's pixel size, and that of each stack where they differ (`ParticleTable`).

        Raises:
            InputError: the rows of one stack differ.
        """
        differ = self._high - self._low > _SAME_PIXEL * self._high
        if differ.any():
            stack = int(np.flatnonzero(differ)[0])
            raise InputError(
                f"pixel sizes from {self._low[stack]:g} to {self._high[stack]:g} Å in one stack; rescale the particles "
                "to one pixel size"
            )
        if not len(self._high):
            return 0.0, ()
        largest = float(self._high.max())
        if largest - self._high.min() <= _SAME_PIXEL * largest:
            return float(self._high[0]), ()
        return largest, tuple(self._high.tolist())


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
        stacks: names of the image stacks, as the source gives them.
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
