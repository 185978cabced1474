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
ALWAYS = ("stack", "stack_index", "source_row", "optics_group", "half")

Columns = dict[str, npt.NDArray]


def _first_bad(values: npt.NDArray, bad: npt.NDArray, name: str, wanted: str) -> None:
    """Raise for the first row where `bad` holds."""
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
        raise InputError(f"particle table: {name} of row {row + 1} is {values[row].tolist()}, it must be {wanted}")


@dataclass(frozen=True)
class ParticleTable:
    """N particles: one pixel size, the stacks that hold them, and columns of length N (`COLUMNS`).

    The CTF columns are all present or all absent (`has_ctf`), and so are rotation and shift (`has_pose`).
    Where U < V the two are swapped and the astigmatism angle turned by 90°.

    Args:
        pixel_size: Å; 0 when the table does not say.
        stacks: names of the image stacks, as the source gives them.
        columns: arrays by name; converted to the dtypes of `COLUMNS`.

    Raises:
        InputError: a column is missing, of the wrong shape, not finite, or out of range.
    """

    pixel_size: float
    stacks: tuple[str, ...]
    columns: Columns

    def __post_init__(self) -> None:
        if not (np.isfinite(self.pixel_size) and self.pixel_size >= 0):
            raise InputError(f"particle table: pixel size {self.pixel_size} Å is not a positive number")
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise InputError(f"particle table: unknown columns {', '.join(unknown)}")
        for group in (ALWAYS, CTF_COLUMNS, POSE_COLUMNS):
            missing = [name for name in group if name not in self.columns]
            if missing and (group is ALWAYS or len(missing) < len(group)):
                raise InputError(f"particle table: missing columns {', '.join(missing)}")
        count = len(self.columns["stack"])
        converted: Columns = {}
        for name, (dtype, shape) in COLUMNS.items():
            if name in self.columns:
                values = np.ascontiguousarray(self.columns[name], dtype=dtype)
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

    def select(self, rows: npt.NDArray[np.integer] | slice) -> "ParticleTable":
        """The table of some rows; stacks are kept as they are."""
        picked = {name: values[rows] for name, values in self.columns.items()}
        return ParticleTable(self.pixel_size, self.stacks, picked)

    def image_names(self) -> list[str]:
        """RELION's name of every image: `000001@stack`, counted from 1."""
        index, stack = self.columns["stack_index"], self.columns["stack"]
        return [f"{i + 1:06d}@{self.stacks[s]}" for i, s in zip(index.tolist(), stack.tolist(), strict=True)]
