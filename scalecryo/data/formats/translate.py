"""What RELION's tables and cryoSPARC's both know beyond images, CTF and poses: micrographs, classes, beam tilt.

Conventions. `location/center_x_frac`, `_y_frac` are fractions of the micrograph, whose `location/micrograph_shape` is
(rows, columns); RELION counts pixels. cryoSPARC counts classes from 0, RELION from 1. `ctf/tilt_A` is Cs · sin(beam
tilt) in Å along x and y; RELION's beam tilt is in mrad. `alignments2D/pose` is RELION's psi in radians, its shift as
RELION's origin, in pixels.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.relion import OwnColumns

Fields = dict[str, NDArray]
#: Rows and columns of a micrograph by its name; None where it cannot be seen.
ShapeOf = Callable[[str], tuple[int, int] | None]

_MICROGRAPH, _X, _Y = "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY"
_CLASS, _PSI = "rlnClassNumber", "rlnAnglePsi"
_TILTS = ("rlnBeamTiltX", "rlnBeamTiltY")
_ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
#: RELION's column and cryoSPARC's field of one meaning and unit, and the value at which it does nothing.
_SAME = {"rlnCtfBfactor": ("ctf/bfactor", 0.0), "rlnCtfScalefactor": ("ctf/scale", 1.0)}
#: Fields that the tables' own readers and writers take over, or that say nothing.
_TAKEN = ("uid", "blob/", "ctf/type", "ctf/exp_group_id", "ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast", "ctf/df1_A",
          "ctf/df2_A", "ctf/df_angle_rad", "ctf/phase_shift_rad", "ctf/scale_const", "alignments3D/split",
          "alignments3D/shift", "alignments3D/pose", "alignments3D/psize_A", "alignments3D/class_posterior",
          "alignments3D/class_ess", "location/exp_group_id", "location/micrograph_shape")  # fmt: skip
_TAKEN_COLUMNS = {
    "rlnImageName", "rlnOpticsGroup", "rlnOpticsGroupName", "rlnVoltage", "rlnSphericalAberration",
    "rlnAmplitudeContrast", "rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality", "rlnDefocusU",
    "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnAngleRot", "rlnAngleTilt", _PSI, *_ORIGINS, "rlnOriginX",
    "rlnOriginY", "rlnRandomSubset", "rlnMaxValueProbDistribution", "rlnMagnification", "rlnDetectorPixelSize",
    "rlnPixelSize", "rlnMicrographOriginalPixelSize",
}  # fmt: skip


class Extra(NamedTuple):
    """What one package's table says that the other one's can say too.

    Args:
        columns: by row; texts are bytes.
        optics: by row, of what the optics say.
        left: names of what the other package has no place for.
    """

    columns: Fields
    optics: Fields
    left: tuple[str, ...]


def relion_extra(rows: NDArray[np.void]) -> Extra:
    """RELION's columns of a cryoSPARC table."""
    names = rows.dtype.names or ()
    columns, optics = _located(rows), {}
    used = {"location/micrograph_path", "location/center_x_frac", "location/center_y_frac"} if columns else set()
    flat = "alignments3D/pose" not in names and {"alignments2D/pose", "alignments2D/shift"} <= set(names)
    kind = "alignments2D" if flat else "alignments3D"
    if f"{kind}/class" in names:
        columns[_CLASS] = rows[f"{kind}/class"].astype(np.int64) + 1
        used.add(f"{kind}/class")
    if flat:
        size = rows["alignments2D/psize_A" if "alignments2D/psize_A" in names else "blob/psize_A"].astype(np.float64)
        columns |= {name: np.zeros(len(rows)) for name in ("rlnAngleRot", "rlnAngleTilt")}
        columns[_PSI] = np.degrees(rows["alignments2D/pose"].astype(np.float64))
        columns |= {name: rows["alignments2D/shift"][:, axis] * size for axis, name in enumerate(_ORIGINS)}
        used |= {"alignments2D/pose", "alignments2D/shift", "alignments2D/psize_A"}
    for name, (field, plain) in _SAME.items():
        if field in names:
            used.add(field)
            if (rows[field] != plain).any():
                columns[name] = rows[field].astype(np.float64)
    if {"ctf/tilt_A", "ctf/cs_mm"} <= set(names) and rows["ctf/tilt_A"].any() and (rows["ctf/cs_mm"] > 0).all():
        sine = rows["ctf/tilt_A"] / (1e7 * rows["ctf/cs_mm"].astype(np.float64)[:, None])
        if (np.abs(sine) <= 1).all():
            optics = {name: 1e3 * np.arcsin(sine[:, axis]) for axis, name in enumerate(_TILTS)}
            used.add("ctf/tilt_A")
    left = [name for name in names if name not in used and not name.startswith(_TAKEN) and _says(rows[name])]
    return Extra(columns, optics, tuple(left))


def _located(rows: NDArray[np.void]) -> Fields:
    """Micrograph and place on it, where a table has both."""
    names = rows.dtype.names or ()
    columns: Fields = {}
    path = next((name for name in ("location/micrograph_path", "micrograph_blob/path") if name in names), None)
    if path is not None:
        texts, which = np.unique(rows[path].astype("S"), return_inverse=True)
        columns[_MICROGRAPH] = np.array([text.removeprefix(b">") for text in texts.tolist()], dtype="S")[which]
    centre = [f"location/center_{axis}_frac" for axis in "xy"]
    if {*centre, "location/micrograph_shape"} <= set(names):
        shape = rows["location/micrograph_shape"].astype(np.float64)
        columns |= {_X: rows[centre[0]] * shape[:, 1], _Y: rows[centre[1]] * shape[:, 0]}
    return columns


def _says(values: NDArray) -> bool:
    """Whether a field is anything but empty or zero."""
    return bool((values != b"").any() if values.dtype.base.kind == "S" else values.astype(bool).any())


def cryosparc_extra(own: OwnColumns, shape_of: ShapeOf, pixel_sizes: NDArray[np.floating], posed: bool) -> Extra:
    """cryoSPARC's fields of a STAR file.

    Args:
        own: the file's columns.
        shape_of: how large the micrographs are, of which RELION's tables do not say it.
        pixel_sizes: of every particle's image, Å.
        posed: whether the file holds poses in three dimensions.

    Raises:
        InputError: a column that should hold numbers does not.
    """
    count, names = len(pixel_sizes), set(own.names)
    fields: Fields = {}
    used: set[str] = set()
    if _MICROGRAPH in names:
        fields |= _location(own, shape_of)
        used |= {_MICROGRAPH, *((_X, _Y) if "location/center_x_frac" in fields else ())}
    kind = "alignments3D" if posed else "alignments2D"
    if _CLASS in names:
        fields[f"{kind}/class"] = np.maximum(own.numbers(_CLASS) - 1, 0).astype(np.uint32)
        used.add(_CLASS)
    if not posed and _PSI in names:
        fields["alignments2D/pose"] = np.radians(own.numbers(_PSI)).astype(np.float32)
        origin = [own.numbers(name) if name in names else np.zeros(count) for name in _ORIGINS]
        fields["alignments2D/shift"] = (np.stack(origin, 1) / pixel_sizes[:, None]).astype(np.float32)
        fields["alignments2D/psize_A"] = pixel_sizes.astype(np.float32)
        fields["alignments2D/class_posterior"] = np.ones(count, np.float32)
    for name, (field, _) in _SAME.items():
        if name in names:
            fields[field] = own.numbers(name).astype(np.float32)
            used.add(name)
    if {*_TILTS, "rlnSphericalAberration"} <= names:
        tilt = np.stack([own.numbers(name) for name in _TILTS], 1)
        fields["ctf/tilt_A"] = np.sin(1e-3 * tilt) * 1e7 * own.numbers("rlnSphericalAberration")[:, None]
        fields["ctf/tilt_A"] = fields["ctf/tilt_A"].astype(np.float32)
        used |= {*_TILTS}
    left = tuple(name for name in own.names if name not in used | _TAKEN_COLUMNS)
    return Extra(fields, {}, left)


def _location(own: OwnColumns, shape_of: ShapeOf) -> Fields:
    names, which = np.unique(np.array(own.strings(_MICROGRAPH), dtype="S"), return_inverse=True)
    uids = [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") for name in names.tolist()]
    fields: Fields = {
        "location/micrograph_path": names[which],
        "location/micrograph_uid": np.array(uids, dtype=np.uint64)[which],
    }
    if {_X, _Y} <= set(own.names):
        shapes = [shape_of(name.decode(errors="replace")) for name in names.tolist()]
        if all(shape is not None for shape in shapes):
            shape = np.array(shapes, dtype=np.uint32)[which]
            fields["location/micrograph_shape"] = shape
            fields["location/center_x_frac"] = (own.numbers(_X) / shape[:, 1]).astype(np.float32)
            fields["location/center_y_frac"] = (own.numbers(_Y) / shape[:, 0]).astype(np.float32)
    return fields


def left_behind(extra: Extra | Mapping[str, object], package: str) -> str:
    """One line on what a package's table has no place for; empty where that is nothing."""
    left = extra.left if isinstance(extra, Extra) else ()
    return f"left behind, since {package}'s tables have no place for them: {', '.join(left)}" if left else ""
