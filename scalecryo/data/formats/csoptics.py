"""What cryoSPARC's tables say of a microscope's optics beside defocus: what is applied, and what is named and left out.

`ctf/tilt_A` is the axial coma, Cs · sin(beam tilt), in Å along x and y (cryoSPARC's forum, "Understanding values of
beamtilt": its third-order term over Cs is the tilt), with the sign of RELION's beam tilt (as pyem converts it). No
published source says the signs and factors of trefoil, tetrafoil and anisotropic magnification.
"""

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.relion.aberrations import coma_terms, without_idle
from scalecryo.data.particles import COLUMNS, Columns

COMA = "ctf/tilt_A"
NOT_APPLIED = {"shift_A": 2, "trefoil_A": 2, "tetra_A": 4, "anisomag": 4}  # of ctf/, and their sizes
_SCALES = {"ctf/bfactor": 0.0, "ctf/scale": 1.0, "alignments3D/alpha": 1.0}  # and where they do nothing


def coma_columns(coma: NDArray[np.floating], ctf: Columns) -> Columns:
    """The columns of aberrations that axial coma makes, (n, 2) Å; none where it does nothing."""
    count = len(coma)
    found: Columns = {
        "odd_phase": coma_terms(coma, ctf["voltage"]),
        "even_phase": np.zeros((count, *COLUMNS["even_phase"][1])),
        "magnification": np.tile(np.eye(2), (count, 1, 1)),
    }
    return without_idle(found)


def not_applied(rows: NDArray[np.void]) -> tuple[str, ...]:
    """Fields of aberrations, envelopes and scales that are not zero (or not one), and that no CTF here knows."""
    names = set(rows.dtype.names or ())
    plain = {f"ctf/{name}": 0.0 for name in NOT_APPLIED} | _SCALES
    plain |= {} if "ctf/df1_A" in names else {COMA: 0.0}
    found = [name for name, value in plain.items() if name in names and rows.dtype[name].base.kind == "f"]
    found = [name for name in found if (rows[name] != plain[name]).any()]
    flat, solid = "alignments2D/pose", "alignments3D/pose"
    if flat in names and solid not in names and rows.dtype[flat].kind == "f":
        found += [f"{flat} (of a 2D classification: no poses)"] * bool(rows[flat].any())
    return tuple(found)
