"""A strain of the map: the one deformation that poses and map can creep along together, and a way to cross it at once.

Where most views lie near one axis, images say little of how far apart in angle those views are: a map that is stretched
or squashed along the axis, with all views tilted to match, explains them almost as well as the right one. Alternating
between poses and map then closes only a few per cent of the gap in each iteration. The velocity of that creep is
measured by how poses turned, and followed to where it would end (the secant method).

A map V(S⁻¹ x), S symmetric and near 1, has at S d (made a unit vector) the view that V has at d.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.rotation import geodesic_angle, vector_from_rotation

MOST_TURN_DEG = 10.0  # particles that turned further changed their mode, and tell nothing of a strain
STILL = 1e-3  # strain of an iteration that is none
LASTING = 0.7  # share of it that the next one must bring as well: what dies away by itself is no creep
SIGNIFICANT = 9.0  # squared strain, in units of what chance gives
FIRST_STEP = 8.0  # times the first iteration's strain: less than what a creep of 10 % an iteration needs
MOST_STRAIN = 0.15  # that is followed at once


def _basis() -> Float[Tensor, "5 3 3"]:
    """Of symmetric matrices without trace, of unit norm: a change of scale turns no view."""
    half, sixth = 0.5**0.5, 6**-0.5
    basis = torch.zeros(5, 3, 3, dtype=torch.float64)
    basis[0, 0, 0], basis[0, 1, 1] = half, -half
    basis[1].fill_diagonal_(-sixth)[2, 2] = 2 * sixth
    for number, (i, j) in enumerate(((0, 1), (0, 2), (1, 2)), 2):
        basis[number, i, j] = basis[number, j, i] = half
    return basis


_BASIS = _basis()


class StrainFit:
    """Least squares of how the poses of each half turned: a rotation of all together, and a strain.

    A strain 1 + E turns a pose with the view d by d × E d, to first order, and not about d.

    Attributes:
        normal, right: normal equations of each half; sums over particles, so those of several workers add.
        spread: summed squares of the turns, and their number.
    """

    def __init__(self, device: torch.device) -> None:
        self.normal = torch.zeros(2, 8, 8, dtype=torch.float64, device=device)
        self.right = torch.zeros(2, 8, dtype=torch.float64, device=device)
        self.spread = torch.zeros(2, 2, dtype=torch.float64, device=device)

    def add(self, before: Float[Tensor, "b 3 3"], after: Float[Tensor, "b 3 3"], use: Tensor, half: Tensor) -> None:
        """Take in poses before and after an iteration.

        Args:
            before, after: rotations.
            use: particles to count.
            half: 1 or 2.
        """
        turn = vector_from_rotation((after @ before.mT).double())
        view = before[:, :, 2].double()
        basis = _BASIS.to(view)
        strained = torch.linalg.cross(view[:, None].expand(-1, 5, -1), torch.einsum("mij,bj->bmi", basis, view))
        design = torch.cat([torch.eye(3).to(view).expand(len(view), 3, 3), strained], 1)
        near = use & (geodesic_angle(before, after) < MOST_TURN_DEG)
        for number in (0, 1):
            weight = (near & (half == number + 1)).double()
            self.normal[number] += torch.einsum("b,bmi,bni->mn", weight, design, design)
            self.right[number] += torch.einsum("b,bmi,bi->m", weight, design, turn)
            self.spread[number, 0] += (weight * turn.square().sum(1)).sum()
            self.spread[number, 1] += weight.sum()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums."""
        return self.normal, self.right, self.spread

    def strain(self) -> Float[Tensor, "2 3 3"]:
        """E of each half, symmetric, without trace; 0 where it is no larger than chance would have it."""
        ridge = 1e-6 * self.normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-9
        inverse = torch.linalg.inv(self.normal + ridge * torch.eye(8).to(ridge))
        solved = (inverse @ self.right[:, :, None])[:, :, 0]
        residual = (self.spread[:, 0] - (solved * self.right).sum(1)).clamp_min(0)
        variance = residual / (3 * self.spread[:, 1] - 8).clamp_min(1)
        chance = variance * inverse.diagonal(dim1=1, dim2=2)[:, 3:].sum(1)
        strain = solved[:, 3:] * (solved[:, 3:].square().sum(1) > SIGNIFICANT * chance)[:, None]
        return torch.einsum("hm,mij->hij", strain, _BASIS.to(solved))


class StrainSteps:
    """Where the creep would end: the strain at which its velocity is zero, by Broyden's method, for both halves alike.

    Halves begin at one map, and their views are crowded alike: they share the strain, and its velocity is the mean of
    theirs. After a step the maps need an iteration to become those of the new poses: its velocity says nothing.
    """

    def __init__(self) -> None:
        self._velocity: Float[Tensor, " 5"] | None = None
        self._moved = torch.zeros(5, dtype=torch.float64)  # since that velocity was measured
        self._inverse = -(FIRST_STEP + 1) * torch.eye(5, dtype=torch.float64)  # of the Jacobian
        self._recovering = self._creeping = self._stepped = False

    def follow(self, strain: Float[Tensor, "2 3 3"]) -> Float[Tensor, "3 3"]:
        """The strain to apply now, zero for none.

        Args:
            strain: of each half's map by the iteration that just ended: the velocity.
        """
        velocity = torch.einsum("hij,mij->hm", strain.cpu().double(), _BASIS).mean(0)
        if self._recovering:
            self._moved += velocity
            self._recovering = False
            return torch.zeros(3, 3, dtype=torch.float64)
        if not self._creeping:
            self._creeping = self._lasts(velocity)
        step = self._step(velocity) if self._creeping else torch.zeros_like(velocity)
        self._velocity, self._moved = velocity, velocity + step
        self._recovering = self._stepped = bool(step.any())
        return torch.einsum("m,mij->ij", step, _BASIS)

    def _lasts(self, velocity: Float[Tensor, " 5"]) -> bool:
        """Whether two iterations in a row strained the maps alike."""
        if self._velocity is None:
            return False
        same, before = float(velocity @ self._velocity), float(self._velocity.square().sum())
        return before**0.5 > STILL and same > LASTING * before

    def _step(self, velocity: Float[Tensor, " 5"]) -> Float[Tensor, " 5"]:
        if float(velocity.norm()) < STILL:
            return torch.zeros_like(velocity)
        if self._velocity is not None and self._stepped:  # what one iteration moves by itself is too little to tell
            moved, inverse = self._moved, self._inverse
            change = velocity - self._velocity
            predicted = inverse @ change
            scale = float(moved @ predicted)
            # A creep that grows as it goes on has no end that can be told: its pull grew, with the views' weights.
            if float(moved @ change) < 0 and scale > 1e-3 * float(moved.square().sum()):
                self._inverse = inverse + torch.outer(moved - predicted, moved @ inverse) / scale
        step = -(self._inverse @ velocity) - velocity  # the iteration itself went one velocity on
        return step * min(1.0, MOST_STRAIN / max(float(step.norm()), STILL))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("velocity", "moved", "inverse", "recovering", "creeping", "stepped")
        return {name: getattr(self, f"_{name}") for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        if "stepped" in state:  # older checkpoints have steps of each half by itself: begun anew
            for name, value in state.items():
                setattr(self, f"_{name}", value)


def strained_poses(rotation: Float[Tensor, "b 3 3"], strain: Float[Tensor, "3 3"]) -> Float[Tensor, "b 3 3"]:
    """The poses of the same images against the strained map: of all rotations the nearest to S⁻¹ R in the plane."""
    inverse = torch.linalg.inv(torch.eye(3).to(strain) + strain).to(rotation)
    left, _, right = torch.linalg.svd(inverse @ rotation[:, :, :2], full_matrices=False)
    plane = left @ right
    return torch.cat([plane, torch.linalg.cross(plane[:, :, 0], plane[:, :, 1])[:, :, None]], -1)
