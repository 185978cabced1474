"""What real data have and an ideal simulation lacks, drawn particle by particle.

Every kind is drawn from a stream of its own, so that switching one on changes no other draw.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from scalecryo.data.formats.relion import JUNK
from scalecryo.data.particles import ParticleTable
from scalecryo.data.simulation.settings import Imperfections
from scalecryo.errors import InputError
from scalecryo.physics.rotation import euler_to_rotation, random_rotations

MICROGRAPH_IMAGES = 100
#: Kinds of junk, as truth.star labels them (`JUNK`); 0 is a particle.
EMPTY, BLOB = 1, 2
# Grey levels of images scatter by so many noise deviations times the spread of the gain.
_OFFSET_SIGMAS = 3.0
# Distance of a neighbour's centre, in particle diameters.
_NEIGHBOUR_DISTANCE = (0.9, 1.3)


def stream(seed: int, name: str) -> torch.Generator:
    """The stream of random numbers of one kind of draw."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Neighbours:
    """The second particle of some images.

    Attributes:
        present: whether an image has one.
        rotation: its pose.
        direction: unit vector in the image from the box's centre to the neighbour's.
        distance: of their centres, in particle diameters.
        class_index: which density it has.
    """

    present: NDArray[np.bool_]
    rotation: Float[NDArray, "n 3 3"]
    direction: Float[NDArray, "n 2"]
    distance: Float[NDArray, " n"]
    class_index: Int[NDArray, " n"]


@dataclass(frozen=True)
class Conditions:
    """Under which conditions each of n particles is imaged.

    Attributes:
        micrograph: on which it lies, from 0; 100 consecutive rows share one.
        class_index: which of the densities it has, from 0.
        junk: 0 a particle, 1 nothing, 2 another object.
        scale: of the signal.
        gain: of signal and noise.
        offset: of the grey level, in standard deviations of the noise.
        neighbours: None without any.
    """

    micrograph: Int[NDArray, " n"]
    class_index: Int[NDArray, " n"]
    junk: Int[NDArray, " n"]
    scale: Float[NDArray, " n"]
    gain: Float[NDArray, " n"]
    offset: Float[NDArray, " n"]
    neighbours: Neighbours | None

    def labels(self, wanted: Imperfections, classes: int) -> dict[str, NDArray]:
        """Columns for truth.star: those of what was asked for, the micrograph always.

        rlnClassNumber counts the densities from 1 and is 0 for junk. Labels that RELION has no name for begin with
        `scalecryo`; RELION keeps them as they are.
        """
        columns: dict[str, NDArray] = {"rlnMicrographName": self.micrograph_names()}
        if classes > 1 or wanted.junk > 0:
            columns["rlnClassNumber"] = np.where(self.junk > 0, 0, self.class_index + 1)
        if wanted.junk > 0:
            columns[JUNK] = self.junk
        if self.neighbours is not None:
            columns["scalecryoNeighbour"] = self.neighbours.present.astype(np.int64)
        if wanted.scale_sd > 0:
            columns["rlnGroupScaleCorrection"] = self.scale
        if wanted.gain_sd > 0:
            columns |= {"rlnNormCorrection": self.gain, "scalecryoOffset": self.offset}
        return columns

    def micrograph_names(self) -> NDArray:
        """Names of the micrographs, one for each particle."""
        return np.array([b"micrograph%06d.mrc" % (number + 1) for number in self.micrograph.tolist()])


def _normal(count: int, generator: torch.Generator) -> Float[NDArray, " n"]:
    return torch.randn(count, generator=generator, dtype=torch.float64).numpy()


def _uniform(count: int, generator: torch.Generator) -> Float[NDArray, " n"]:
    return torch.rand(count, generator=generator, dtype=torch.float64).numpy()


def _share(count: int, share: float, generator: torch.Generator) -> NDArray[np.integer]:
    """round(share × count) different rows, in random order."""
    return torch.randperm(count, generator=generator).numpy()[: round(share * count)]


def draw_conditions(
    count: int, wanted: Imperfections, classes: int, seed: int, shares: Sequence[float] = ()
) -> Conditions:
    """The conditions of `count` particles of `classes` densities, as probable as `shares` say (none: equally)."""
    if shares and (len(shares) != classes or min(shares) < 0 or sum(shares) <= 0):
        raise InputError(f"{len(shares)} shares of {classes} structures: give a number from 0 for each, e.g. 3 1")
    micrograph = np.arange(count) // MICROGRAPH_IMAGES
    junk = np.zeros(count, np.int64)
    chosen = _share(count, wanted.junk, stream(seed, "junk"))
    junk[chosen] = BLOB
    junk[chosen[: (len(chosen) + 1) // 2]] = EMPTY
    classed = stream(seed, "class")
    gains = stream(seed, "gain")
    scale = np.exp(wanted.scale_sd * _normal(int(micrograph[-1]) + 1, stream(seed, "scale")))
    gain = np.exp(wanted.gain_sd * _normal(count, gains))
    offset = _OFFSET_SIGMAS * wanted.gain_sd * _normal(count, gains)
    return Conditions(
        micrograph,
        _draw_classes(count, classes, shares, classed),
        junk,
        scale[micrograph],
        gain,
        offset,
        _draw_neighbours(count, wanted.neighbours, classes, junk == EMPTY, stream(seed, "neighbours")),
    )


def _draw_classes(count: int, classes: int, shares: Sequence[float], generator: torch.Generator) -> Int[NDArray, " n"]:
    if not shares:
        return torch.randint(classes, (count,), generator=generator).numpy()
    weight = torch.tensor(shares, dtype=torch.float64)
    return torch.multinomial(weight, count, replacement=True, generator=generator).numpy()


def _draw_neighbours(
    count: int, share: float, classes: int, empty: NDArray[np.bool_], generator: torch.Generator
) -> Neighbours | None:
    """Neighbours of a share of the images; those that are to be empty stay so."""
    if share == 0:
        return None
    present = np.zeros(count, dtype=bool)
    present[_share(count, share, generator)] = True
    angle = 2 * np.pi * _uniform(count, generator)
    low, high = _NEIGHBOUR_DISTANCE
    return Neighbours(
        present & ~empty,
        random_rotations(count, generator, dtype=torch.float64).numpy(),
        np.stack([np.cos(angle), np.sin(angle)], axis=-1),
        low + (high - low) * _uniform(count, generator),
        torch.randint(classes, (count,), generator=generator).numpy(),
    )


def with_preferred_views(table: ParticleTable, prefer: tuple[float, float] | None, seed: int) -> ParticleTable:
    """The table with a share of its views near the volume's +z axis, uniform over that cap; in-plane turns uniform.

    A view is the third column of a rotation, its angle to +z RELION's tilt.
    """
    if prefer is None:
        return table
    share, degrees = prefer
    generator = stream(seed, "prefer")
    rows = _share(len(table), share, generator)
    rot, cap, psi = (torch.rand(len(rows), generator=generator, dtype=torch.float64) for _ in range(3))
    tilt = torch.rad2deg(torch.arccos(1 - cap * (1 - math.cos(math.radians(degrees)))))
    rotation = table.columns["rotation"].copy()
    rotation[rows] = euler_to_rotation(torch.stack([360 * rot, tilt, 360 * psi], dim=-1)).numpy()
    return _changed(table, {"rotation": rotation})


def with_defocus_errors(table: ParticleTable, error_a: float, seed: int) -> ParticleTable:
    """The table with each particle's defocus off by a normal error, the same for U and V.

    Raises:
        InputError: the particles have no CTF.
    """
    if error_a == 0:
        return table
    if not table.has_ctf:
        raise InputError("a defocus error without a CTF means nothing: give a defocus range too")
    error = error_a * _normal(len(table), stream(seed, "defocus error"))
    return _changed(table, {name: table.columns[name] + error for name in ("defocus_u", "defocus_v")})


def _changed(table: ParticleTable, columns: Mapping[str, NDArray]) -> ParticleTable:
    return ParticleTable(
        table.pixel_size, table.stacks, {**table.columns, **columns}, table.stack_pixel_sizes, table.stack_boxes
    )
