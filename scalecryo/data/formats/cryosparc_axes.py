"""From RELION's axes of a point group to cryoSPARC's."""

import re

import numpy as np
from numpy.typing import NDArray


def turn_of_axes(group: str) -> NDArray[np.float64] | None:
    """The rotation from RELION's axes of a point group to cryoSPARC's: Dn has a two-fold on y there, not on x.

    None where both programs' groups hold the same rotations: all but Dn of odd n.
    """
    found = re.fullmatch(r"D(\d+)", group.strip().upper())
    if found is None or int(found.group(1)) % 2 == 0:
        return None
    return np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def turned_map(density: NDArray[np.floating], group: str) -> NDArray[np.floating]:
    """A map (z, y, x), even boxes centred at index N//2, laid from RELION's axes onto cryoSPARC's: voxels move."""
    if turn_of_axes(group) is None:
        return density
    # V'(x, y) = V(y, -x): the turn by 90° about z takes x to y.
    opposite = np.roll(density[:, ::-1], 1, axis=1)
    return np.ascontiguousarray(opposite.transpose(0, 2, 1))
