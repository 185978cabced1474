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
from scalecryo.physics.rotation import euler_to_rotation

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


def _blocks(url: str, data: bytes | None = None) -> dict[str, Any]:
    """Every block of a STAR file.

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
        except (ValueError, IndexError, UnicodeDecodeError, pd.errors.ParserError) as error:
            raise InputError(f"{shown}: not a readable STAR file ({str(error).splitlines()[0]})") from error
    if not blocks:
        raise InputError(f"{shown}: not a STAR file (it has no data_ block)")
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame) and not isinstance(block.index, pd.RangeIndex):
            raise InputError(f"{shown}: rows of block data_{name} have more values than the block has columns")
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
