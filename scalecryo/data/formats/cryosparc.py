"""cryoSPARC's .cs tables: NumPy structured arrays in .npy format, one row per particle.

`alignments3D/pose` is the rotation vector, in radians, of our R (checked against cryoDRGN's conversion of a real
refinement: A = Rᵀ). `alignments3D/shift` is in pixels with RELION's sign, minus ours. Angles are in radians, lengths in
Å, `blob/idx` counts from 0, `blob/sign` is −1 where the images are protein-dark.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.csoptics import COMA, NOT_APPLIED, coma_columns
from scalecryo.data.formats.csrows import build, encode, read
from scalecryo.data.formats.rotations import matrix_to_vector, vector_to_matrix
from scalecryo.data.io import urls
from scalecryo.data.particles import CTF_COLUMNS, Columns, ParticleTable, StackPixels, dense_groups
from scalecryo.errors import InputError

#: Our column and cryoSPARC's field, where only the unit differs; the factor turns cryoSPARC's into ours.
_CTF: Mapping[str, tuple[str, float]] = {
    "defocus_u": ("ctf/df1_A", 1.0),
    "defocus_v": ("ctf/df2_A", 1.0),
    "astigmatism_angle": ("ctf/df_angle_rad", 180 / np.pi),
    "voltage": ("ctf/accel_kv", 1.0),
    "spherical_aberration": ("ctf/cs_mm", 1.0),
    "amplitude_contrast": ("ctf/amp_contrast", 1.0),
    "phase_shift": ("ctf/phase_shift_rad", 180 / np.pi),
}
_POSE, _SHIFT, _PIXEL, _SPLIT = (f"alignments3D/{name}" for name in ("pose", "shift", "psize_A", "split"))
_MICROGRAPH = "location/micrograph_uid"
_CONFIDENCE = "alignments3D/class_posterior"
_CLASS = "alignments3D/class"

Floats = NDArray[np.float64]
Rows = NDArray[np.void]


def _numbers(rows: Rows, name: str, where: str, shape: tuple[int, ...] = ()) -> Floats:
    """A field as finite numbers."""
    kind = rows.dtype[name]
    if kind.shape != shape or kind.base.kind not in "iuf":
        raise InputError(f"{where}: field {name} is {kind}, not numbers of shape {shape}")
    with np.errstate(invalid="ignore"):
        values = rows[name].astype(np.float64)
    bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"{where}: {name} of row {row + 1} is {values[row].tolist()}, not a number")
    return values


def _whole(rows: Rows, name: str, where: str) -> NDArray[np.int64]:
    """A field as whole numbers."""
    kind = rows.dtype[name]
    if kind.shape or kind.kind not in "iu":
        raise InputError(f"{where}: field {name} is {kind}, not whole numbers")
    values = rows[name]
    if kind.kind == "u" and len(values) and int(values.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{where}: {name} goes up to {values.max()}; that is no number of an image or group")
    whole: NDArray[np.int64] = values.astype(np.int64)
    return whole


def _paths(rows: Rows, where: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Stacks, and which of them every row names. A path that starts with > is relative to the table's own folder."""
    kind = rows.dtype["blob/path"]
    if kind.shape or kind.kind not in "SU":
        raise InputError(f"{where}: field blob/path is {kind}, not text")
    stacks, stack = np.unique(rows["blob/path"], return_inverse=True)
    try:
        texts = [path.decode() if isinstance(path, bytes) else str(path) for path in stacks.tolist()]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: a blob/path is not UTF-8 text") from error
    if len(rows) and not all(text.removeprefix(">") for text in texts):
        raise InputError(f"{where}: a row has an empty blob/path")
    return tuple(text.removeprefix(">") for text in texts), stack.reshape(-1).astype(np.int64)


def poses_of(rows: Rows, where: str) -> tuple[Floats, Floats] | None:
    """Rotations (N, 3, 3) and shifts (N, 2) in Å, in double precision; None where the rows have none.

    Raises:
        InputError: a field is not what cryoSPARC writes.
    """
    names = rows.dtype.names or ()
    if _POSE not in names or _SHIFT not in names:
        return None
    pixel = _shift_pixel(rows, where)
    return vector_to_matrix(_numbers(rows, _POSE, where, (3,))), -_numbers(rows, _SHIFT, where, (2,)) * pixel[:, None]


def _shift_pixel(rows: Rows, where: str) -> Floats:
    """Å of the pixels that shifts are counted in: the images' own where the alignment does not say, or says 0."""
    own = _numbers(rows, "blob/psize_A", where)
    if _PIXEL not in (rows.dtype.names or ()):
        return own
    stated = _numbers(rows, _PIXEL, where)
    return np.where(stated > 0, stated, own)


def classes_of(rows: Rows) -> dict[str, NDArray[np.float64]]:
    """The column `class`, counted from 1 as RELION does; nothing where the rows have none."""
    return {"class": rows[_CLASS].astype(np.float64) + 1} if _CLASS in (rows.dtype.names or ()) else {}


def confidence_of(rows: Rows, where: str) -> Floats | None:
    """The class posterior of every row; None where the rows have none."""
    return _numbers(rows, _CONFIDENCE, where) if _CONFIDENCE in (rows.dtype.names or ()) else None


def sign_of(rows: Rows, where: str) -> int | None:
    """−1 where blob/sign says that all images are protein-dark, 1 bright; None where it does not say.

    Raises:
        InputError: it says both.
    """
    if "blob/sign" not in (rows.dtype.names or ()) or not len(rows):
        return None
    sign = np.sign(_numbers(rows, "blob/sign", where))
    if sign.min() != sign.max():
        dark = np.count_nonzero(sign < 0)
        raise InputError(
            f"{where}: blob/sign is −1 for {dark:,} and 1 for {len(sign) - dark:,} particles; convert them apart"
        )
    return int(sign[0]) or None


def not_finite(rows: Rows) -> dict[int, str]:
    """Rows with nan or inf in a field that `table_of` reads, and what is so."""
    read = [*(field for field, _ in _CTF.values()), _POSE, _SHIFT, _PIXEL, "blob/psize_A", COMA]
    bad: dict[int, str] = {}
    for name in (name for name in read if name in (rows.dtype.names or ()) and rows.dtype[name].base.kind == "f"):
        values = rows[name].reshape(len(rows), -1)
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            bad.setdefault(row, f"{name} is {rows[name][row].tolist()}")
    return bad


def table_of(rows: Rows, where: str) -> ParticleTable:
    """The particle table of a .cs file's rows; poses and CTF where they have them.

    Raises:
        InputError: a field is missing or holds what it should not.
    """
    names = rows.dtype.names or ()
    missing = [name for name in ("blob/path", "blob/idx", "blob/psize_A") if name not in names]
    if missing:
        raise InputError(
            f"{where}: field {missing[0]} is missing; give a .cs file of particles with their blob, the job's .csg, or "
            "the file that has it by --passthrough"
        )
    stacks, stack = _paths(rows, where)
    pixel = _numbers(rows, "blob/psize_A", where)
    if len(pixel) and pixel.min() <= 0:
        raise InputError(f"{where}: blob/psize_A of row {int(pixel.argmin()) + 1} is {pixel.min():g}, not positive")
    group = "ctf/exp_group_id"
    groups = _whole(rows, group, where) + 1 if group in names else np.ones(len(rows), np.int64)
    columns: Columns = {
        "stack": stack,
        "stack_index": _whole(rows, "blob/idx", where),
        "source_row": np.arange(len(rows)),
        "optics_group": dense_groups(groups),
        "half": _whole(rows, _SPLIT, where) + 1 if _SPLIT in names else np.zeros(len(rows)),
    }
    if _MICROGRAPH in names:
        columns["micrograph"] = np.unique(rows[_MICROGRAPH], return_inverse=True)[1].reshape(-1)
    if "ctf/df1_A" in names:
        without = [field for ours, (field, _) in _CTF.items() if field not in names and ours != "phase_shift"]
        if without:
            raise InputError(f"{where}: field {without[0]} is missing (the CTF needs it and defocus is given)")
        columns |= {
            ours: _numbers(rows, field, where) * factor if field in names else np.zeros(len(rows))
            for ours, (field, factor) in _CTF.items()
        }
        if COMA in names:
            columns |= coma_columns(_numbers(rows, COMA, where, (2,)), columns)
    poses = poses_of(rows, where)
    if poses is not None:
        columns["rotation"], columns["shift"] = poses
    pixels = StackPixels()
    boxes = _numbers(rows, "blob/shape", where, (2,))[:, 0] if "blob/shape" in names else None
    try:
        columns["stack"] = pixels.places(pixels.add(stack, pixel, boxes))
        pixel_size, by_stack = pixels.sizes()
        return ParticleTable(pixel_size, pixels.names(stacks), columns, by_stack, pixels.boxes())
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_particles(url: str, passthrough: Sequence[str] = ()) -> ParticleTable:
    """The particle table of a .cs file or a .csg group; poses and CTF where it has them.

    Args:
        url: the table.
        passthrough: .cs files of the same particles that hold more fields, joined by uid.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a .cs file, or a field is missing.
    """
    return table_of(read(url, passthrough), urls.redacted(url))


def _alignment(
    rotation: NDArray[np.floating], shift_px: NDArray[np.floating], half: NDArray[np.integer]
) -> dict[str, NDArray]:
    """The fields that a pose becomes; float32 only at the end."""
    vector = matrix_to_vector(rotation)
    return {
        _SPLIT: np.maximum(np.asarray(half) - 1, 0).astype(np.uint32),
        _SHIFT: np.asarray(shift_px).astype(np.float32),
        _POSE: vector.astype(np.float32),
    }


def _new_alignment(count: int, pixel_size: NDArray[np.floating]) -> dict[str, NDArray]:
    """The other fields of a 3D alignment."""
    return {
        _PIXEL: np.asarray(pixel_size, dtype=np.float32),
        "alignments3D/alpha": _constant(count, 1.0),
        _CLASS: np.zeros(count, np.uint32),
        _CONFIDENCE: _constant(count, 1.0),
        "alignments3D/class_ess": _constant(count, 1.0),
    }


def write_particles(
    url: str,
    table: ParticleTable,
    box_size: int | NDArray,
    sign: int = 1,
    confidence: NDArray[np.floating] | None = None,
    pose: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    more: Mapping[str, NDArray] = MappingProxyType({}),
) -> None:
    """Write a .cs file of particles with blob, CTF and 3D alignment, where the table has them.

    Args:
        url: where to.
        table: particles.
        box_size: of the images, px; one for all, or (N,).
        sign: −1 where the stacks that the table names are protein-dark.
        confidence: (N,) 0 to 1, written as alignments3D/class_posterior.
        pose: rotation and shift (Å) in double precision, in place of the table's own.
        more: further fields by row.
    """
    urls.write_bytes_atomic(url, encode(own_rows(table, box_size, sign, confidence, pose, more)))


def own_rows(
    table: ParticleTable,
    box_size: int | NDArray,
    sign: int,
    confidence: NDArray[np.floating] | None = None,
    pose: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    more: Mapping[str, NDArray] = MappingProxyType({}),
) -> Rows:
    """The rows of a table's own .cs file; see `write_particles`."""
    columns, count = table.columns, len(table)
    pixel_sizes = table.pixel_sizes()
    stacks = np.array([stack.encode() for stack in table.stacks] or [b""], dtype=np.bytes_)
    fields: dict[str, NDArray] = {
        "uid": _identifiers(table),
        "blob/path": stacks[columns["stack"]],
        "blob/idx": columns["stack_index"].astype(np.uint32),
        "blob/shape": np.repeat(np.broadcast_to(box_size, count).astype(np.uint32)[:, None], 2, axis=1),
        "blob/psize_A": pixel_sizes.astype(np.float32),
        "blob/sign": _constant(count, float(sign)),
    }
    if table.has_ctf:
        fields |= {"ctf/type": np.full(count, b"imported")}
        fields |= {"ctf/exp_group_id": np.maximum(columns["optics_group"] - 1, 0).astype(np.uint32)}
        fields |= {_CTF[name][0]: (columns[name] / _CTF[name][1]).astype(np.float32) for name in CTF_COLUMNS}
        fields |= {"ctf/scale": _constant(count, 1.0), "ctf/scale_const": _constant(count, 0.0)}
        fields |= {f"ctf/{name}": np.zeros((count, size), np.float32) for name, size in NOT_APPLIED.items()}
        fields |= {COMA: np.zeros((count, 2), np.float32)}
        fields |= {"ctf/bfactor": _constant(count, 0.0)}
    if pose is None and table.has_pose:
        pose = columns["rotation"], columns["shift"]
    if pose is not None:
        fields |= _alignment(pose[0], -pose[1] / pixel_sizes[:, None], columns["half"])
        fields |= _new_alignment(count, pixel_sizes)
        if confidence is not None:
            fields[_CONFIDENCE] = np.asarray(confidence, dtype=np.float32)
    return build(count, {**fields, **more})


def write_with_poses(
    url: str,
    source: Rows,
    source_row: NDArray[np.integer],
    rotation: NDArray[np.floating],
    shift: NDArray[np.floating],
    confidence: NDArray[np.floating] | None,
    half: NDArray[np.integer],
    class_number: NDArray[np.integer] | None = None,
    more: Mapping[str, NDArray] = MappingProxyType({}),
) -> None:
    """Write a source's own .cs rows with new poses: every uid, field and dtype else as it was.

    Rows of the source without a pose are left out.

    Args:
        url: where to.
        source: the source's rows.
        source_row: (N,) which of them each pose belongs to.
        rotation: (N, 3, 3), image frame to volume frame.
        shift: (N, 2) Å, where the content sits, (x, y).
        confidence: (N,) 0 to 1; None to leave cryoSPARC's.
        half: (N,) 1 or 2.
        class_number: (N,) from 1, written as alignments3D/class, from 0; None leaves the source's.
        more: further fields, by row of the poses.

    Raises:
        InputError: a row is not in the source, or twice.
    """
    order = np.argsort(source_row, kind="stable")
    if len(np.unique(source_row)) < len(source_row) or source_row.max(initial=-1) >= len(source):
        raise InputError(
            f"{urls.redacted(url)}: the source table has {len(source)} rows, the poses are for {len(source_row)} others"
        )
    rows = source[source_row[order]]
    names = rows.dtype.names or ()
    pixel = _shift_pixel(rows, urls.redacted(url))
    new = _alignment(rotation[order], -shift[order] / pixel[:, None], np.asarray(half)[order])
    if confidence is not None:
        new[_CONFIDENCE] = np.asarray(confidence)[order].astype(np.float32)
    if class_number is not None:
        new[_CLASS] = (class_number[order] - 1).astype(np.uint32)
    fields = {name: rows[name] for name in names}
    for name, values in {**_new_alignment(len(rows), pixel), **new}.items():
        if name not in names:
            fields[name] = values
        elif name in new:
            fields[name] = values.astype(rows.dtype[name].base)
    fields |= {name: values[order] for name, values in more.items()}
    urls.write_bytes_atomic(url, encode(build(len(rows), fields)))


def component_fields(z: NDArray[np.floating]) -> dict[str, NDArray]:
    """Coordinates (N, q) as the fields of cryoSPARC's variability analysis."""
    fields: dict[str, NDArray] = {}
    for mode, values in enumerate(z.T):
        fields[f"components_mode_{mode}/component"] = np.full(len(z), mode, np.uint32)
        fields[f"components_mode_{mode}/value"] = values.astype(np.float32)
    return fields


def write_group(url: str, table_name: str) -> None:
    """Write the .csg file by which cryoSPARC's Import Result Group job takes in a .cs file of the same folder."""
    rows = read(urls.join(urls.parent(url), table_name))
    kinds = dict.fromkeys(name.partition("/")[0] for name in rows.dtype.names or () if "/" in name)
    lines = [
        f"created: {datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
        "group:",
        "  description: Particles with poses by scalecryo",
        "  name: particles",
        "  title: Particles",
        "  type: particle",
        "results:",
    ]
    for kind in kinds:
        lines += [f"  {kind}:", f"    metafile: '>{table_name}'"]
        lines += [f"    num_items: {len(rows)}", f"    type: particle.{kind}"]
    urls.write_bytes_atomic(url, "\n".join([*lines, "version: v4.4.1", ""]).encode())


def _identifiers(table: ParticleTable) -> NDArray[np.uint64]:
    """A 64-bit number for every particle, from the name of its image, so that it is the same in every export.

    Rows that name an image again get numbers of their own: cryoSPARC knows particles by them.
    """
    seen: dict[str, int] = {}
    names = table.image_names()
    for row, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[row] = f"{name}#{seen[name]}"
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _constant(count: int, value: float) -> NDArray[np.float32]:
    return np.full(count, value, np.float32)
