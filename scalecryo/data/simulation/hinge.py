"""Conformers of a structure: some of its chains turned about a hinge."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.structure import Atoms
from scalecryo.errors import InputError

_CONTACT = 8.0  # Å between atoms on both sides of a hinge
_MOST_STEPS = 1000
_BLOCK = 512


@dataclass(frozen=True)
class Hinge:
    """How conformers are made.

    Attributes:
        chains: names of those that turn, in every conformer as one body.
        axis: unit vector (x, y, z) in the frame of the file; None: another random axis for each conformer.
        degrees: range of the turns: conformer i of n turns by degrees · i / n where that is a full circle, else from
            −degrees / 2 to degrees / 2 in equal steps; about random axes: by a uniform angle up to `degrees`.
        steps: number of conformers.
    """

    chains: tuple[str, ...]
    axis: tuple[float, float, float] | None
    degrees: float
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Hinge":
        """Read CHAINS:AXIS:DEGREES:STEPS, e.g. `A,B:z:60:20`, `H:0,1,1:360:100` or `A:random:40:50`.

        Raises:
            InputError: it says something else.
        """
        repair = "write CHAINS:AXIS:DEGREES:STEPS, e.g. A,B:z:60:20, H:0,1,1:360:100 or A:random:40:50"
        try:
            chains, axis, degrees, steps = text.split(":")
            found = cls(tuple(filter(None, chains.split(","))), _axis(axis), float(degrees), int(steps))
        except ValueError:
            raise InputError(f"hinge {text!r} is not understood: {repair}") from None
        if not found.chains or not 0 < found.degrees <= 360 or not 1 <= found.steps <= _MOST_STEPS:
            raise InputError(f"hinge {text!r}: name chains, 0 < degrees <= 360 and up to {_MOST_STEPS} steps: {repair}")
        return found

    def turns(self, seed: int) -> list[NDArray[np.float64]]:
        """The rotation of each conformer, (3, 3)."""
        if self.axis is None:
            generator = np.random.default_rng([seed, 0x48494E47])
            axes = generator.normal(size=(self.steps, 3))
            angles = self.degrees * generator.uniform(size=self.steps)
            return [_turn(axis, angle) for axis, angle in zip(axes, angles, strict=True)]
        if self.degrees == 360:
            angles = 360.0 * np.arange(self.steps) / self.steps
        else:
            angles = np.linspace(-self.degrees / 2, self.degrees / 2, self.steps) if self.steps > 1 else np.zeros(1)
        return [_turn(np.array(self.axis), angle) for angle in angles]

    def conformers(self, atoms: Atoms, where: str, seed: int) -> list[Atoms]:
        """The structure in every conformer.

        The hinge lies in the middle of the atoms of the turning chains within 8 Å of the others; where there are none,
        at the turning atom nearest to the others' centre.

        Raises:
            InputError: the structure lacks a chain, or has no other.
        """
        names = np.array(atoms.chains)
        missing = [chain for chain in self.chains if chain not in atoms.chains]
        moving = np.isin(names, self.chains)
        if missing or moving.all():
            known = ", ".join(dict.fromkeys(atoms.chains))
            raise InputError(f"{where}: its chains are {known}: turn some of them, not {', '.join(self.chains)}")
        pivot = _pivot(atoms.positions[moving], atoms.positions[~moving])
        made = []
        for turn in self.turns(seed):
            positions = atoms.positions.copy()
            positions[moving] = (positions[moving] - pivot) @ turn.T + pivot
            made.append(Atoms(positions, atoms.elements, atoms.b_factor, atoms.chains))
        return made


def _axis(text: str) -> tuple[float, float, float] | None:
    if text == "random":
        return None
    named = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}
    x, y, z = named[text] if text in named else (float(part) for part in text.split(","))
    length = math.sqrt(x * x + y * y + z * z)
    if not 0 < length < math.inf:
        raise ValueError(text)
    return x / length, y / length, z / length


def _turn(axis: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """Right-handed rotation about an axis (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    angle = math.radians(degrees)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turned: NDArray[np.float64] = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return turned


def _pivot(moving: NDArray[np.float64], fixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """See `Hinge.conformers`."""
    nearest = np.concatenate(
        [
            np.square(moving[start : start + _BLOCK, None] - fixed[None]).sum(-1).min(1)
            for start in range(0, len(moving), _BLOCK)
        ]
    )
    near = nearest <= _CONTACT**2
    if near.any():
        middle: NDArray[np.float64] = moving[near].mean(0)
        return middle
    return moving[np.square(moving - fixed.mean(0)).sum(1).argmin()]
