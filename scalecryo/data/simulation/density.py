"""What is simulated: the densities of structures or maps, centred in a box."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.structure import Atoms, potential_map, read_structure
from scalecryo.data.io import urls
from scalecryo.data.simulation.hinge import Hinge
from scalecryo.data.simulation.projector import Projector
from scalecryo.errors import InputError
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.symmetry import symmetry_rotations

_MAPS = (".mrc", ".map", ".ccp4")
_POWER_SHARE = 0.95
_DIRECTIONS = 4000


def densities(
    sources: Sequence[str],
    box_size: int,
    pixel_size: float,
    symmetry: str = "C1",
    hinge: Hinge | None = None,
    seed: int = 0,
) -> tuple[list[Float[Tensor, "n n n"]], tuple[float, float, float]]:
    """The density of every source, in one frame, and the position of their first voxel in Å (x, y, z).

    The centre of mass of the first structure is at index n//2 of all, so that structures which are docked in their
    files (compositions or states of one assembly) stay so. Maps lie centre on centre.

    With a symmetry each density is the sum over its rotations, about RELION's axes through index n//2. A structure is
    one of the copies: it is first moved off the axes (`_placement`); the position returned is that of this copy. A map
    stays where it is.

    Args:
        sources: structures (PDB, mmCIF) or cubic maps (MRC).
        box_size: px, even.
        pixel_size: Å.
        symmetry: point group (`symmetry_rotations`).
        hinge: of the first structure, which then stands for all of its conformers.
        seed: of a hinge's random turns.

    Raises:
        MissingInputError, InputError: a source is missing, cannot be read, or does not fit in the box; or there is no
            such group.
    """
    rotations = symmetry_rotations(symmetry)
    volumes: list[Tensor] = []
    centre: NDArray[np.floating] | None = None
    origin = (0.0, 0.0, 0.0)
    for number, source in enumerate(sources):
        if source.lower().removesuffix(".gz").removesuffix(".bz2").endswith(_MAPS):
            if number == 0 and hinge is not None:
                raise InputError(f"{urls.redacted(source)}: a map has no chains to turn: give a structure")
            volume = _map_density(source, box_size, pixel_size)
            if len(rotations) > 1:
                projector = Projector(volume, pixel_size)
                volume = torch.stack([projector.turned(rotation) for rotation in rotations]).sum(0)
            volumes.append(volume)
            continue
        atoms = read_structure(source)
        if centre is None:
            centre = atoms.centre_of_mass - _placement(atoms, box_size * pixel_size / 2, rotations)
            x, y, z = (centre - (box_size // 2) * pixel_size).tolist()
            origin = (x, y, z) if not volumes else origin
        own = hinge if number == 0 else None
        for conformer in [atoms] if own is None else own.conformers(atoms, urls.redacted(source), seed):
            copies = _copies(conformer, centre, rotations)
            volumes.append(torch.from_numpy(potential_map(copies, box_size, pixel_size, np.zeros(3))))
    return volumes, origin


def _copies(atoms: Atoms, centre: NDArray[np.floating], rotations: Float[Tensor, "g 3 3"]) -> Atoms:
    """The atoms about a centre, once for each rotation."""
    placed = atoms.positions - centre
    positions = (
        np.concatenate([placed @ rotation.T for rotation in rotations.numpy()]) if len(rotations) > 1 else placed
    )
    return Atoms(positions, atoms.elements * len(rotations), np.tile(atoms.b_factor, len(rotations)))


def _placement(atoms: Atoms, limit: float, rotations: Float[Tensor, "g 3 3"]) -> Float[NDArray, "3"]:
    """Where the centre of mass of one copy of an assembly lies, Å.

    In the direction whose copies are furthest apart, at the radius at which the nearest copies' centres are one
    diameter apart: that of a ball with the structure's radius of gyration. Where the copies would not fit within
    `limit` (Å from the centre) they are moved in, at the price of an overlap.
    """
    if len(rotations) == 1:
        return np.zeros(3)
    index = np.arange(_DIRECTIONS)
    height = 1 - (2 * index + 1) / _DIRECTIONS
    azimuth = index * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - height**2)
    directions = np.stack([ring * np.cos(azimuth), ring * np.sin(azimuth), height], axis=-1)
    cosine = np.einsum("di,gij,dj->dg", directions, rotations.numpy()[1:], directions).max(axis=1)
    best = int(cosine.argmin())
    placed = atoms.positions - atoms.centre_of_mass
    squared = np.square(placed).sum(axis=1)
    touching = 2 * np.sqrt(5 / 3 * (atoms.masses @ squared) / atoms.masses.sum()) / np.sqrt(2 - 2 * cosine[best])
    along = placed @ directions[best]
    fits = np.sqrt(np.maximum(along**2 + limit**2 - squared, 0)) - along
    # A little less, so that rounding leaves no atom outside.
    placed_at: NDArray[np.float64] = max(0.0, min(touching, float(fits.min()) - 1e-3)) * directions[best]
    return placed_at


def _map_density(source: str, box_size: int, pixel_size: float) -> Float[Tensor, "n n n"]:
    volume, own_pixel_size, _ = read_map(source)
    if own_pixel_size <= 0 or len(set(volume.shape)) != 1:
        raise InputError(
            f"{urls.redacted(source)}: {volume.shape} voxels of {own_pixel_size:g} Å: "
            "a cubic map with a pixel size in its header is needed"
        )
    return fit_map(torch.from_numpy(volume), own_pixel_size, box_size, pixel_size)


def diameter(volume: Float[Tensor, "n n n"], pixel_size: float) -> float:
    """Å; twice the radius about the centre within which 95 % of the sum of squares lie."""
    axis = torch.arange(volume.shape[-1]) - volume.shape[-1] // 2
    radius = (axis[:, None, None].square() + axis[:, None].square() + axis.square()).double().sqrt()
    shells = torch.zeros(int(radius.max()) + 2, dtype=torch.float64)
    shells.index_add_(0, radius.round().long().flatten(), volume.double().square().flatten())
    cumulative = shells.cumsum(0)
    return 2 * pixel_size * max(1, int((cumulative < _POWER_SHARE * cumulative[-1]).sum()))


def fit_map(
    volume: Float[Tensor, "n n n"], pixel_size: float, box_size: int, wanted_pixel_size: float
) -> Float[Tensor, "m m m"]:
    """A map resampled to a box and a pixel size (Å), centre on centre.

    The map is cut or padded to M px, resampled in Fourier space to m px, and cut or padded to the box. M and m are even
    and M / m is the ratio of the pixel sizes as nearly as boxes of up to twice the wanted one allow (better than 0.2 %
    from 64 px on).
    """
    ratio = wanted_pixel_size / pixel_size
    if abs(ratio - 1) > 1e-3:
        sampled = min(range(box_size, 2 * box_size + 2, 2), key=lambda m: abs(_even(m * ratio) / (m * ratio) - 1))
        volume = fourier_resize_3d(_recentred(volume, _even(sampled * ratio)), sampled)
    return _recentred(volume, box_size)


def _even(number: float) -> int:
    """The nearest even number, at least 2."""
    return max(2, 2 * round(number / 2))


def _recentred(volume: Float[Tensor, "n n n"], box_size: int) -> Float[Tensor, "m m m"]:
    """Cropped or zero-padded so that index n//2 lands on index m//2; odd boxes are fine."""
    before = box_size // 2 - volume.shape[-1] // 2
    after = box_size - volume.shape[-1] - before
    return torch.nn.functional.pad(volume, (before, after) * 3)
