"""Beam tilt, Zernike coefficients and magnification matrices of RELION's tables, as this package's columns.

RELION 3.1 to 5: rlnBeamTiltX/Y (mrad), rlnOddZernike, rlnEvenZernike (radians and Å^n) and rlnMagMat00 … 11, of optics
groups or of rows. Beam tilt t gives the odd phase -2 pi Cs lambda^2 s^2 (s·t), a sum of Zernike polynomials as well.
"""

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.values import Floats, Values
from scalecryo.data.particles import ABERRATION_COLUMNS, COLUMNS, Columns
from scalecryo.errors import InputError

BEAM_TILT = ("rlnBeamTiltX", "rlnBeamTiltY")
ZERNIKE = {"odd_phase": "rlnOddZernike", "even_phase": "rlnEvenZernike"}
LARGEST_DISTORTION = 0.2  # of a magnification matrix; microscopes have 0.01
MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")


def names() -> tuple[str, ...]:
    """RELION's columns."""
    return (*BEAM_TILT, *ZERNIKE.values(), *MAGNIFICATION)


def wavelength(voltage: npt.NDArray[np.floating]) -> Floats:
    """Relativistic wavelength of electrons in Å, `voltage` in kV."""
    volts = 1e3 * np.asarray(voltage, dtype=np.float64)
    return 12.2643 / np.sqrt(volts * (1 + 0.978466e-6 * volts))


def coma_terms(coma: npt.NDArray[np.floating], voltage: npt.NDArray[np.floating]) -> Floats:
    """Odd Zernike terms, (n, 12), of axial coma Cs · t, (n, 2) in Å along x and y, `voltage` in kV.

    s² x = (Z(3, 1) + 2 Z(1, 1)) / 3, and so for y; terms are ordered (1, ±1), (3, -3), (3, -1), (3, 1), (3, 3).
    """
    x, y = (-2 * np.pi * wavelength(voltage)[:, None] ** 2 * np.asarray(coma, np.float64)).T / 3
    terms = np.zeros((len(x), *COLUMNS["odd_phase"][1]))
    terms[:, 0], terms[:, 1], terms[:, 3], terms[:, 4] = 2 * y, 2 * x, y, x
    return terms


def aberration_columns(values: Values, ctf: Columns) -> Columns:
    """The columns of some rows, whether they do anything or not; none where the table names none, or has no CTF.

    Raises:
        InputError: a value is no number or list of numbers, a list is longer than what is applied, or a pair or matrix
            is not whole.
    """
    if not ctf or not any(name in values for name in names()):
        return {}
    found: Columns = {}
    for ours, theirs in ZERNIKE.items():
        width = COLUMNS[ours][1][0]
        found[ours] = values.lists(theirs, width) if theirs in values else np.zeros((len(values), width))
    if any(name in values for name in BEAM_TILT):
        values.require(BEAM_TILT, "a beam tilt has x and y")
        tilt = np.stack([values.numbers(name) for name in BEAM_TILT], 1)
        terms = coma_terms(1e4 * np.asarray(ctf["spherical_aberration"])[:, None] * tilt, ctf["voltage"])
        # Where a table has both, RELION 3.1.3 takes the terms (3, ±1) from the tilt alone, zero included.
        found["odd_phase"][:, 3:5] = 0
        found["odd_phase"] = found["odd_phase"] + terms
    matrix = np.tile(np.eye(2), (len(values), 1, 1))
    if any(name in values for name in MAGNIFICATION):
        values.require(MAGNIFICATION, "a magnification matrix has four elements")
        matrix = np.stack([values.numbers(name) for name in MAGNIFICATION], -1).reshape(-1, 2, 2)
        far = (np.abs(matrix - np.eye(2)) > LARGEST_DISTORTION).any(axis=(1, 2))
        if far.any():
            row = int(np.flatnonzero(far)[0])
            raise InputError(
                f"{values.where}: the magnification matrix of row {values.rows.first + row + 1} is "
                f"{matrix[row].tolist()}, not within {LARGEST_DISTORTION} of the identity; correct rlnMagMat00 …"
            )
    return {**found, "magnification": matrix}


def without_idle(columns: Columns) -> Columns:
    """The columns of a table, those of aberrations left out where they do nothing."""
    if "magnification" not in columns:
        return columns
    idle = not (columns["odd_phase"].any() or columns["even_phase"].any())
    if idle and (columns["magnification"] == np.eye(2)).all():
        return {name: values for name, values in columns.items() if name not in ABERRATION_COLUMNS}
    return columns


def as_numbers(columns: Columns) -> list[Floats]:
    """The columns of aberrations as one array for each number of a row; none where the table has none."""
    if "magnification" not in columns:
        return []
    rows = np.concatenate([columns[name].reshape(len(columns[name]), -1) for name in ABERRATION_COLUMNS], 1)
    return list(rows.T.astype(np.float64))


def optics_columns(numbers: Floats) -> dict[str, list[bytes]]:
    """RELION's columns of groups, rows (g, 32) as `as_numbers` gives them; beam tilt is among the odd terms."""
    widths = [COLUMNS[ours][1][0] for ours in ZERNIKE]
    found: dict[str, list[bytes]] = {}
    for theirs, lists in zip(ZERNIKE.values(), np.split(numbers, np.cumsum(widths), axis=1)[:-1], strict=True):
        found[theirs] = [b"[" + b",".join(b"%.9g" % value for value in row) + b"]" for row in lists.tolist()]
    matrices = numbers[:, -len(MAGNIFICATION) :].T.tolist()
    return found | {
        name: [b"%.9g" % value for value in values] for name, values in zip(MAGNIFICATION, matrices, strict=True)
    }
