"""cryoDRGN's input files: pickled arrays of poses and of CTF parameters.

Poses are `(rotations (N, 3, 3), translations (N, 2))`: rotations are RELION's Euler matrices A = Rᵀ, translations are
rlnOrigin in fractions of the box, minus our shift. CTF rows are box (px), pixel size (Å), defocus U and V (Å),
astigmatism angle (°), voltage (kV), spherical aberration (mm), amplitude contrast, phase shift (°).
"""

import pickle
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.plainpickle import load
from scalecryo.data.io import urls
from scalecryo.data.particles import CTF_COLUMNS, Columns, ParticleTable
from scalecryo.errors import InputError


class Ctf(NamedTuple):
    """CTF parameters of cryoDRGN's.

    Args:
        box_size: px, of the images that the pixel size belongs to.
        pixel_size: Å.
        columns: our CTF columns.
    """

    box_size: int
    pixel_size: float
    columns: Columns


def _array(
    value: object, shape: tuple[int | None, ...], where: str, what: str, bad: dict[int, str] | None
) -> NDArray[np.float64]:
    """An array of a shape; None stands for any number. Rows that are not finite go to `bad`, or are an error."""
    fits = isinstance(value, np.ndarray) and value.ndim == len(shape)
    if not fits or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):  # type: ignore[attr-defined]
        found = getattr(value, "shape", type(value).__name__)
        wanted = " × ".join("N" if size is None else str(size) for size in shape)
        raise InputError(f"{where}: {what} must be {wanted}, found {found}")
    with np.errstate(invalid="ignore"):
        array = np.asarray(value, dtype=np.float64)
    finite = np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    _leave_out(~finite, what, "are not finite", where, bad)
    return array


def _leave_out(wrong: NDArray[np.bool_], what: str, why: str, where: str, bad: dict[int, str] | None) -> None:
    """Note wrong rows in `bad`; where that is None they are an error that names the first."""
    for row in np.flatnonzero(wrong).tolist():
        if bad is None:
            raise InputError(f"{where}: the {what} of row {row + 1} {why}; --bad-images exclude leaves such rows out")
        bad.setdefault(row, f"the {what} in {urls.name(where)} {why}")


def read_poses(url: str, bad: dict[int, str] | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotations (N, 3, 3), image frame to volume frame, and shifts (N, 2) in fractions of the box, where the content
    sits; zero where the file has none.

    Args:
        url: the file.
        bad: gains the rows that hold no pose, and why; None: they are an error.

    Raises:
        MissingInputError: there is no such file.
        InputError: not poses, or not a pickle of plain arrays.
    """
    where = urls.redacted(url)
    found = load(urls.read_bytes(url), where)
    pair = found if isinstance(found, tuple) else (found,)
    if len(pair) not in (1, 2):
        raise InputError(f"{where}: holds {len(pair)} arrays; poses are rotations, and translations")
    rotation = _array(pair[0], (None, 3, 3), where, "rotations", bad)
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.einsum("nij,nkj->nik", rotation, rotation)
        proper = np.abs(square - np.eye(3)).max(axis=(1, 2)) < 1e-3
        proper &= np.linalg.det(rotation) > 0
    _leave_out(~proper, "matrix", "is not a rotation", where, bad)
    if len(pair) == 1:
        return rotation.transpose(0, 2, 1), np.zeros((len(rotation), 2))
    translation = _array(pair[1], (len(rotation), 2), where, "translations", bad)
    largest = np.abs(translation[np.isfinite(translation)]).max(initial=0)
    if largest > 1:
        raise InputError(f"{where}: translations up to {largest:g}; they are fractions of the box, not pixels")
    return rotation.transpose(0, 2, 1), -translation


def read_ctf(url: str, bad: dict[int, str] | None = None) -> Ctf:
    """CTF parameters of a ctf.pkl.

    Args:
        url: the file.
        bad: gains the rows that are not finite; None: they are an error.

    Raises:
        MissingInputError: there is no such file.
        InputError: not CTF parameters, or not of one box and pixel size.
    """
    where = urls.redacted(url)
    values = _array(load(urls.read_bytes(url), where), (None, 2 + len(CTF_COLUMNS)), where, "CTF parameters", bad)
    good = values[np.isfinite(values).all(axis=1)]
    if not len(good):
        raise InputError(f"{where}: holds no particles")
    box, pixel = good[:, 0], good[:, 1]
    if np.ptp(box) or np.ptp(pixel) > 1e-4 * abs(pixel[0]) or not (0 < box[0] < 1e6 and pixel[0] > 0):
        raise InputError(f"{where}: its particles must have one box and pixel size, both positive")
    return Ctf(int(box[0]), float(pixel[0]), dict(zip(CTF_COLUMNS, values[:, 2:].T, strict=True)))


def write_poses(url: str, table: ParticleTable, box_size: int) -> None:
    """Write poses.pkl for particles with poses, whose images are `box_size` px wide."""
    rotation = np.ascontiguousarray(table.columns["rotation"].transpose(0, 2, 1), dtype=np.float32)
    translation = (-table.columns["shift"] / (table.pixel_size * box_size)).astype(np.float32)
    _write(url, (rotation, translation))


def write_ctf(url: str, table: ParticleTable, box_size: int) -> None:
    """Write ctf.pkl for particles with CTF parameters, whose images are `box_size` px wide."""
    size = np.full(len(table), box_size, np.float32)
    pixel_size = np.full(len(table), table.pixel_size, np.float32)
    _write(url, np.stack([size, pixel_size, *(table.columns[name] for name in CTF_COLUMNS)], axis=1))


def write_latents(url: str, z: NDArray[np.floating]) -> None:
    """Write coordinates (N, q) in a latent space, as cryoDRGN's z.pkl."""
    _write(url, z.astype(np.float32))


def _write(url: str, data: NDArray | tuple[NDArray, ...]) -> None:
    # Protocol 3 writes names as lines of text. NumPy 1 knows its arrays by the older of the two names of one module;
    # NumPy 2 knows both. The name stands once, at the start.
    text = pickle.dumps(data, protocol=3)
    urls.write_bytes_atomic(url, text.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))
