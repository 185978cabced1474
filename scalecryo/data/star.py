"""RELION's STAR files, the only place that knows `rln…` names.

RELION 3.0 (optics in every row, pixel size by magnification) and 3.1 to 5 (optics groups) are read; 3.1 is written.
RELION's origin is minus our shift; its angles (rot, tilt, psi) make our rotation by `physics.rotation`.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import starfile
import torch

from scalecryo.data import files
from scalecryo.data.particles import Columns, ParticleTable
from scalecryo.errors import InputError
from scalecryo.physics.rotation import euler_to_rotation, rotation_to_euler

_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
_ORIGINS = ["rlnOriginXAngst", "rlnOriginYAngst"]
_ORIGINS_PX = ["rlnOriginX", "rlnOriginY"]
#: Our column and RELION's; the first three differ by row, the rest belong to the optics.
_DEFOCUS = {"defocus_u": "rlnDefocusU", "defocus_v": "rlnDefocusV", "astigmatism_angle": "rlnDefocusAngle"}
_OPTICS = {
    "voltage": "rlnVoltage",
    "spherical_aberration": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_MAX_CONFIDENCE = "rlnMaxValueProbDistribution"


class StarPoses(NamedTuple):
    """Poses of a STAR file, row by row.

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


def _blocks(url: str, data: bytes | None = None, verbatim: bool = False) -> dict[str, Any]:
    """Every block of a STAR file; `verbatim` keeps every value as the text it was.

    Raises:
        MissingInputError, InputError: there is no such file, or it is not a STAR file.
    """
    data = files.read_bytes(url) if data is None else data
    shown = files.shown(url)
    # starfile reads from a path only.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.star"
        path.write_bytes(data)
        try:
            blocks: dict[str, Any] = starfile.read(path, always_dict=True)
            if verbatim:
                names = sorted({str(name) for block in blocks.values() for name in block})
                blocks = starfile.read(path, always_dict=True, parse_as_string=names)
        except (ValueError, IndexError, UnicodeDecodeError, pd.errors.ParserError) as error:
            raise InputError(f"{shown}: not a readable STAR file ({str(error).splitlines()[0]})") from error
    if not blocks:
        raise InputError(f"{shown}: not a STAR file (it has no data_ block)")
    return blocks


def _particle_block(blocks: Mapping[str, Any], shown: str) -> tuple[str, pd.DataFrame]:
    """Name and rows of the block that lists images."""
    if "model_general" in blocks:
        raise InputError(f"{shown}: a RELION model file, not a particle table; give the run's …_data.star")
    for name, block in blocks.items():
        if name != "optics" and "rlnImageName" in block:
            return name, block if isinstance(block, pd.DataFrame) else pd.DataFrame([block])
    raise InputError(f"{shown}: no block has the column rlnImageName; give a particle table")


def _numbers(frame: pd.DataFrame, name: str, shown: str) -> npt.NDArray[np.float64]:
    """A column as finite numbers."""
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"{shown}: {name} of row {row + 1} is {frame[name].iloc[row]!r}, not a number")
    return values


def _require(frame: pd.DataFrame, names: list[str], shown: str, why: str) -> None:
    missing = [name for name in names if name not in frame]
    if missing:
        raise InputError(f"{shown}: column {', '.join(missing)} is missing ({why}); add it to the file")


def _with_optics(blocks: Mapping[str, Any], particles: pd.DataFrame, shown: str) -> pd.DataFrame:
    """Particle rows with their optics group's columns beside them; a row's own column wins."""
    optics = blocks.get("optics")
    if optics is None:
        return particles
    optics = optics if isinstance(optics, pd.DataFrame) else pd.DataFrame([optics])
    _require(optics, ["rlnOpticsGroup"], shown, "every optics group has a number")
    if "rlnOpticsGroup" not in particles:
        if len(optics) > 1:
            _require(particles, ["rlnOpticsGroup"], shown, f"there are {len(optics)} optics groups")
        particles = particles.assign(rlnOpticsGroup=optics["rlnOpticsGroup"].iloc[0])
    unknown = ~particles["rlnOpticsGroup"].isin(optics["rlnOpticsGroup"])
    if unknown.any():
        group = particles["rlnOpticsGroup"][unknown].iloc[0]
        raise InputError(f"{shown}: optics group {group} is used by a particle but not described in data_optics")
    if optics["rlnOpticsGroup"].duplicated().any():
        raise InputError(f"{shown}: data_optics describes an optics group twice")
    extra = [name for name in optics if name not in particles]
    looked_up = optics.set_index("rlnOpticsGroup")[extra].loc[particles["rlnOpticsGroup"]]
    return pd.concat([particles.reset_index(drop=True), looked_up.reset_index(drop=True)], axis=1)


def _pixel_size(frame: pd.DataFrame, shown: str) -> float:
    """The one pixel size of all rows in Å; 0 when the file has none."""
    if "rlnImagePixelSize" in frame:
        sizes = _numbers(frame, "rlnImagePixelSize", shown)
    elif "rlnMagnification" in frame and "rlnDetectorPixelSize" in frame:
        # RELION ≤ 3.0: detector pixel in µm.
        sizes = 1e4 * _numbers(frame, "rlnDetectorPixelSize", shown) / _numbers(frame, "rlnMagnification", shown)
    elif "rlnPixelSize" in frame:
        sizes = _numbers(frame, "rlnPixelSize", shown)
    else:
        return 0.0
    if not len(sizes):
        return 0.0
    if sizes.max() - sizes.min() > 1e-4 * sizes.max():
        raise InputError(
            f"{shown}: pixel sizes from {sizes.min():g} to {sizes.max():g} Å; rescale the particles to one pixel size"
        )
    if not (np.isfinite(sizes[0]) and sizes[0] > 0):
        raise InputError(f"{shown}: pixel size {sizes[0]:g} Å; it must be positive")
    return float(sizes[0])


def _image_names(frame: pd.DataFrame, shown: str) -> tuple[tuple[str, ...], Columns]:
    """Stacks in order of appearance, and the columns `stack` and `stack_index`."""
    text = frame["rlnImageName"].astype(str)
    split = text.str.split("@", n=1, expand=True)
    if len(text) == 0:
        return (), {"stack": np.zeros(0), "stack_index": np.zeros(0)}
    number = pd.to_numeric(split[0], errors="coerce")
    bad = (
        (number.isna() | (number < 1) | (number % 1 != 0)).to_numpy()
        if split.shape[1] == 2
        else np.full(len(text), True)
    )
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{shown}: rlnImageName of row {row + 1} is {text.iloc[row]!r}; it must read number@stack, numbers from 1"
        )
    codes, stacks = pd.factorize(split[1])
    return tuple(map(str, stacks)), {"stack": codes, "stack_index": number.to_numpy(dtype=np.int64) - 1}


def _ctf_columns(frame: pd.DataFrame, shown: str) -> Columns:
    """The CTF columns, or none when the file has no defocus."""
    if not any(name in frame for name in _DEFOCUS.values()):
        return {}
    _require(frame, list(_DEFOCUS.values()), shown, "the CTF needs both defoci and their angle")
    _require(frame, list(_OPTICS.values()), shown, "the CTF needs it and defocus is given")
    columns = {ours: _numbers(frame, theirs, shown) for ours, theirs in {**_DEFOCUS, **_OPTICS}.items()}
    phase = "rlnPhaseShift"
    columns["phase_shift"] = _numbers(frame, phase, shown) if phase in frame else np.zeros(len(frame))
    return columns


def _rotation(frame: pd.DataFrame, shown: str) -> npt.NDArray[np.float64]:
    angles = np.stack([_numbers(frame, name, shown) for name in _ANGLES], axis=-1)
    rotation: npt.NDArray[np.float64] = euler_to_rotation(torch.from_numpy(angles)).numpy()
    return rotation


def _shift(frame: pd.DataFrame, pixel_size: float, shown: str) -> npt.NDArray[np.float64] | None:
    """Shift in Å: minus RELION's origin."""
    if all(name in frame for name in _ORIGINS):
        return -np.stack([_numbers(frame, name, shown) for name in _ORIGINS], axis=-1)
    if all(name in frame for name in _ORIGINS_PX):
        origin = np.stack([_numbers(frame, name, shown) for name in _ORIGINS_PX], axis=-1)
        if not pixel_size and origin.any():
            raise InputError(f"{shown}: origins are in pixels but there is no pixel size; add rlnImagePixelSize")
        return -origin * pixel_size
    return None


def _half(frame: pd.DataFrame, shown: str) -> npt.NDArray[np.float64]:
    if "rlnRandomSubset" not in frame:
        return np.zeros(len(frame))
    subset = _numbers(frame, "rlnRandomSubset", shown)
    return np.where(np.isin(subset, (1, 2)), subset, 0)


def read_particles(url: str) -> ParticleTable:
    """The particle table of a STAR file.

    Poses are taken when the file has all three angles; shifts are 0 where it has no origins. Columns that this package
    has no use for are left in the file.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a STAR file, not a particle table, a column missing or not numeric, or unlike pixel sizes.
    """
    shown = files.shown(url)
    blocks = _blocks(url)
    _, particles = _particle_block(blocks, shown)
    frame = _with_optics(blocks, particles, shown)
    pixel_size = _pixel_size(frame, shown)
    stacks, columns = _image_names(frame, shown)
    columns["source_row"] = np.arange(len(frame))
    group = "rlnOpticsGroup"
    columns["optics_group"] = _numbers(frame, group, shown) if group in frame else np.ones(len(frame))
    columns["half"] = _half(frame, shown)
    columns |= _ctf_columns(frame, shown)
    if all(name in frame for name in _ANGLES):
        shift = _shift(frame, pixel_size, shown)
        columns["rotation"] = _rotation(frame, shown)
        columns["shift"] = np.zeros((len(frame), 2)) if shift is None else shift
    try:
        return ParticleTable(pixel_size, stacks, columns)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error


def image_key(name: str) -> tuple[int, str]:
    """Index and bare file name of an image: tables that name the stack's folder differently still match."""
    index, _, stack = name.partition("@")
    return int(index), files.name(stack)


def read_poses(url: str) -> StarPoses:
    """Image names, rotations, shifts, halves and confidences of a STAR file.

    Raises:
        MissingInputError, InputError: as `read_particles`, or the file has no angles.
    """
    shown = files.shown(url)
    blocks = _blocks(url)
    _, particles = _particle_block(blocks, shown)
    frame = _with_optics(blocks, particles, shown)
    _require(frame, _ANGLES, shown, "poses were asked for")
    confidence = _numbers(frame, _MAX_CONFIDENCE, shown) if _MAX_CONFIDENCE in frame else None
    return StarPoses(
        frame["rlnImageName"].astype(str).tolist(),
        _rotation(frame, shown),
        _shift(frame, _pixel_size(frame, shown), shown),
        _half(frame, shown).astype(np.int8),
        confidence,
    )


def _write_blocks(url: str, blocks: Mapping[str, pd.DataFrame]) -> None:
    text = starfile.to_string(dict(blocks), na_rep="nan")
    # RELION tells old files from new ones by this line.
    files.write_bytes_atomic(url, text.replace("\ndata_", "\n# version 30001\n\ndata_").encode())


def _pose_columns(
    rotation: npt.NDArray[np.floating], shift: npt.NDArray[np.floating]
) -> dict[str, npt.NDArray[np.float64]]:
    """RELION's angles in degrees and origins in Å."""
    angles = rotation_to_euler(torch.from_numpy(np.asarray(rotation, dtype=np.float64))).numpy()
    columns = {name: angles[:, axis] for axis, name in enumerate(_ANGLES)}
    # Minus zero would be written as -0.000000.
    return columns | {name: 0.0 - np.asarray(shift, dtype=np.float64)[:, axis] for axis, name in enumerate(_ORIGINS)}


def _optics_blocks(
    frame: pd.DataFrame, names: list[str], pixel_size: float, box_size: int | None
) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
    """The optics table of rows that each carry their own optics, and every row's group number from 1."""
    keys = [name for name in ["rlnOpticsGroup", *names] if name in frame]
    if keys:
        grouped = frame.groupby(keys, sort=True)
        optics = grouped.size().reset_index()[keys]
        group = grouped.ngroup().to_numpy(dtype=np.int64) + 1
    else:
        optics, group = pd.DataFrame(index=range(1)), np.ones(len(frame), dtype=np.int64)
    numbers = np.arange(1, len(optics) + 1)
    head = {"rlnOpticsGroup": numbers, "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers]}
    optics = pd.concat([pd.DataFrame(head), optics[[name for name in names if name in optics]]], axis=1)
    if pixel_size:
        optics["rlnImagePixelSize"] = pixel_size
    if box_size:
        optics = optics.assign(rlnImageSize=box_size, rlnImageDimensionality=2)
    return optics, group


def write_particles(
    url: str, names: list[str], table: ParticleTable, with_poses: bool, box_size: int | None = None
) -> None:
    """Write a RELION 3.1 particle table; the file appears whole or not at all.

    Args:
        url: where to.
        names: `i@stack` of every row, numbers from 1.
        table: the particles; CTF columns are written when it has them.
        with_poses: also write rotations and shifts, which the table must have.
        box_size: of the images, px, for the optics table.
    """
    columns = table.columns
    frame = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": columns["optics_group"]})
    shared: list[str] = []
    if table.has_ctf:
        frame = frame.assign(**{theirs: columns[ours].astype(np.float64) for ours, theirs in _DEFOCUS.items()})
        frame["rlnPhaseShift"] = columns["phase_shift"].astype(np.float64)
        shared = list(_OPTICS.values())
        frame = frame.assign(**{theirs: columns[ours].astype(np.float64) for ours, theirs in _OPTICS.items()})
    optics, frame["rlnOpticsGroup"] = _optics_blocks(frame, shared, table.pixel_size, box_size)
    frame = frame.drop(columns=shared)
    if columns["half"].any():
        frame["rlnRandomSubset"] = columns["half"]
    if with_poses:
        frame = frame.assign(**_pose_columns(columns["rotation"], columns["shift"]))
    _write_blocks(url, {"optics": optics, "particles": frame})


def write_with_poses(
    url: str,
    source_star: bytes | None,
    table: ParticleTable,
    rotation: npt.NDArray[np.floating],
    shift: npt.NDArray[np.floating],
    confidence: npt.NDArray[np.floating],
    half: npt.NDArray[np.integer],
    box_size: int | None = None,
) -> None:
    """Write the source's own table with new poses: all its rows and columns, every other value as it was.

    A RELION 3.0 table gains the optics table of 3.1; its own columns stay. Rows are matched by `source_row`.

    Args:
        url: where to.
        source_star: the source's STAR file (`ParticleStore.source_star`); None writes `table` itself.
        table: the particles that the poses belong to.
        rotation: (N, 3, 3), image frame to volume frame.
        shift: (N, 2) Å, where the content sits, (x, y).
        confidence: (N,) 0 to 1, written as rlnMaxValueProbDistribution.
        half: (N,) 1 or 2.
        box_size: of the images, px, for an optics table that is made.

    Raises:
        InputError: the table does not cover the source's rows one for one.
    """
    shown = files.shown(url)
    if source_star is None:
        names = table.image_names()
        write_particles(url, names, table, False, box_size)
        source_star = files.read_bytes(url)
        source_row = np.arange(len(table))
    else:
        source_row = table.columns["source_row"]
    blocks = _blocks(url, source_star, verbatim=True)
    block_name, frame = _particle_block(blocks, shown)
    if not np.array_equal(np.sort(source_row), np.arange(len(frame))):
        raise InputError(f"{shown}: the source table has {len(frame)} rows, the poses are for {len(table)} others")
    order = np.argsort(source_row)
    new = {name: values[order] for name, values in _pose_columns(rotation, shift).items()}
    if table.pixel_size:
        # Where the file also has origins in pixels, the two must agree.
        pixels = zip(_ORIGINS_PX, _ORIGINS, strict=True)
        new |= {px: new[angst] / table.pixel_size for px, angst in pixels if px in frame}
    frame = frame.assign(
        **new, rlnRandomSubset=np.asarray(half)[order], **{_MAX_CONFIDENCE: np.asarray(confidence)[order]}
    )
    optics = blocks.get("optics")
    if optics is None:
        optics, frame["rlnOpticsGroup"] = _optics_blocks(frame, list(_OPTICS.values()), table.pixel_size, box_size)
    elif not isinstance(optics, pd.DataFrame):
        optics = pd.DataFrame([optics])
    if "rlnOpticsGroup" not in frame:
        frame["rlnOpticsGroup"] = optics["rlnOpticsGroup"].iloc[0]
    others = {name: block for name, block in blocks.items() if name not in (block_name, "optics")}
    _write_blocks(url, {"optics": optics, "particles": frame, **others})
