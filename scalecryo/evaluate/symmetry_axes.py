"""Where the axes of a point group lie in a map, and how well the map agrees with the group.

In a frame (Q, c) a map V has the group's symmetry when V(h x + c) = V(x + c) for h = Qᵀ g Q and all rotations g. All
frames are tried by the mean shell correlation of the map with its turned selves: first over a grid on SO(3), about the
map's centre of mass, then by gradient ascent in rotation and centre at rising resolution. Conventions as in `align`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import Planes, SliceComparison, apply_alignment, whitened
from scalecryo.evaluate.local_minima import local_minima
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.rotation import geodesic_angle, rotation_from_vector
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup

_GRID, _SEARCH_RADIUS, _MARGIN_DEG, _APART_DEG = 4608, 6.0, 7.5, 15.0
# Candidates of the search; radii of refinement (Fourier pixels), rotations of the group that are compared, slices,
# evaluations, and how many go on after each.
_CANDIDATES = 12
_RADII = ((8.0, 3, 12, 12, 3), (12.0, 3, 24, 15, 1), (math.inf, 6, 72, 25, 1))
_LEAST_SHELL = 2  # the first shell hardly tells rotations apart


@dataclass(frozen=True)
class SymmetryAxes:
    """A group's frame in a map.

    Attributes:
        alignment: lays the map onto RELION's axes: V'(y) = V(Qᵀ (y − u)).
        agreement: mean shell correlation of the map with itself under the rotation that it agrees with least.
    """

    alignment: Alignment
    agreement: float

    def rotations(self, group: PointGroup) -> Float[Tensor, "g 3 3"]:
        """The group's rotations about the axes where they lie in the map itself."""
        turn = self.alignment.rotation.double()
        return turn.mT @ group.rotations.double() @ turn


def symmetry_axes(
    volume: Float[Tensor, "n n n"],
    group: PointGroup,
    radius: float,
    centre_px: Float[Tensor, "3"],
) -> SymmetryAxes:
    """The frame in which a map agrees best with itself under a group, and how well.

    Args:
        volume: the map, free of noise outside the particle as far as possible.
        group: a point group, not C1.
        radius: Fourier pixels that are compared: up to where the map shows signal.
        centre_px: where the axes are sought first, from the box's centre, (x, y, z): the centre of mass.
    """
    group = group.to("cpu")  # as the map is: it is small, and what looks for the frame goes step by step
    box = min(volume.shape[-1], 2 * math.ceil(radius + 2))
    scale = volume.shape[-1] / box
    compared = _Compared(fourier_resize_3d(volume, box).cpu(), group, min(radius, box / 2 - 1))
    frames = [(torch.eye(3), torch.zeros(3)), *compared.search(centre_px.cpu().float() / scale)]
    for limit, count, slices, evaluations, keep in _RADII:
        reach = min(limit, compared.radius)
        refined = compared.refine(frames, reach, count, slices, evaluations)
        refined.sort(key=lambda found: -found[2])
        frames = [(turn, centre) for turn, centre, _ in refined[:keep]]
    turn, centre = frames[0]
    turn = _least_turn(turn, group)
    if group.name.startswith("C"):
        axis = turn[2]
        centre = centre - (centre @ axis) * axis  # along the axis nothing is known
    agreement = float(compared.curves(turn, centre)[:, _LEAST_SHELL:].mean(1).min())
    return SymmetryAxes(Alignment(turn, False, -(turn @ centre) * scale, agreement), agreement)


def symmetrised_map(volume: Float[Tensor, "n n n"], group: PointGroup) -> Float[Tensor, "n n n"]:
    """The mean of a map's copies under a group about RELION's axes."""
    total = torch.zeros_like(volume)
    for rotation in group.rotations.cpu():
        total += apply_alignment(volume, Alignment(rotation, False, torch.zeros(3), 1.0))
    return total / len(group)


def on_the_axes(alignment: Alignment, group: PointGroup, little_deg: float = 10.0) -> Alignment:
    """Of how one map lies on another that has the same axes: what keeps the axes, where it turns little.

    Cn: the turn about z and the shift along it. The other groups leave nothing. A turn further than `little_deg`, by a
    pseudo-symmetry, is left as it is.
    """
    turn = alignment.rotation
    if float(geodesic_angle(turn, torch.eye(3).to(turn))) > little_deg:
        return alignment
    if not group.name.startswith("C"):
        return Alignment(torch.eye(3).to(turn), alignment.mirrored, torch.zeros_like(turn[0]), alignment.score)
    along = alignment.shift_px * alignment.shift_px.new_tensor([0.0, 0.0, 1.0])
    about = torch.atan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1]) * torch.eye(3)[2].to(turn)
    return Alignment(rotation_from_vector(about), alignment.mirrored, along, alignment.score)


class _Compared:
    """A map and its copies under a group in any frame."""

    def __init__(self, volume: Float[Tensor, "n n n"], group: PointGroup, radius: float) -> None:
        self._slices = SliceComparison(volume, volume)
        self.radius, self._box, self._group = radius, volume.shape[-1], group
        self._all = group.others

    def search(self, centre_px: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The best frames of a grid about a centre, some degrees apart."""
        planes = self._slices.planes(12, min(_SEARCH_RADIUS, self.radius))
        truth = whitened(planes.truth[None], planes)[0].conj()
        weight = planes.pixels.weight * (planes.pixels.shell > 0)
        grid = so3_grid(_GRID)
        grid = grid[self._group.in_unit(grid, _MARGIN_DEG)]
        score = torch.zeros(len(grid))
        for rotation in self._some(_RADII[0][1]):
            for at in torch.arange(len(grid)).split(512):
                turned = grid[at].mT @ rotation @ grid[at]
                shift = centre_px - turned @ centre_px
                phase = torch.einsum("cpi,bi->bcp", planes.place, shift) * (-2 * math.pi / self._box)
                moved = whitened(self._slices.slices(turned, planes), planes) * torch.polar(
                    torch.ones_like(phase), phase
                )
                score[at] += ((moved * truth).real * weight).sum((1, 2))
        found: list[tuple[Tensor, Tensor]] = []
        while len(found) < _CANDIDATES and float(score.max()) > -math.inf:
            best = grid[int(score.argmax())]
            found.append((best, centre_px))
            copies = self._group.nearest(grid, best.expand_as(grid))
            score[geodesic_angle(copies, best.expand_as(copies)) < _APART_DEG] = -math.inf
        return found

    def _some(self, count: int) -> Tensor:
        """About so many rotations, spread over the group."""
        return self._all[:: math.ceil(len(self._all) / count)]

    def refine(
        self, frames: Sequence[tuple[Tensor, Tensor]], radius: float, count: int, slices: int, evaluations: int
    ) -> list[tuple[Tensor, Tensor, float]]:
        """Local maxima of the mean shell correlation over some rotations, by BFGS on so(3) × R³."""
        planes, unit = self._slices.planes(slices, radius), self._box / (2 * math.pi * radius)
        some = self._some(count)
        turns, centres = (torch.stack(parts) for parts in zip(*frames, strict=True))

        def moved(step: Tensor) -> tuple[Tensor, Tensor]:
            return rotation_from_vector(step[:, :3] / radius) @ turns, centres + step[:, 3:] * unit

        def score(turn: Tensor, centre: Tensor) -> Tensor:
            return self._curves(some, turn, centre, planes)[..., 1:].mean((1, 2))

        turn, centre = moved(local_minima(lambda step: -score(*moved(step)), torch.zeros(len(frames), 6), evaluations))
        return list(zip(turn, centre, score(turn, centre).tolist(), strict=True))

    @torch.no_grad()
    def curves(self, turn: Tensor, centre: Tensor) -> Float[Tensor, "g s"]:
        """Shell correlation under each rotation of the group."""
        planes = self._slices.planes(24, self.radius)
        return torch.cat([self._curves(one, turn[None], centre[None], planes)[0] for one in self._all.split(6)])

    def _curves(self, rotations: Tensor, turn: Tensor, centre: Tensor, planes: Planes) -> Float[Tensor, "f g s"]:
        """Of each frame under each rotation."""
        own = turn.mT[:, None] @ rotations @ turn[:, None]
        shift = centre[:, None] - (own @ centre[:, None, :, None])[..., 0]
        curves = self._slices.curves(own.flatten(0, 1), shift.flatten(0, 1), planes)
        return curves.unflatten(0, (len(turn), -1))


def _least_turn(turn: Float[Tensor, "3 3"], group: PointGroup) -> Float[Tensor, "3 3"]:
    """Of the frames in which the group is the same, the one that turns the map least.

    Cn: its axis, or the opposite direction, straight onto z. The others: one of the copies g Q.
    """
    if not group.name.startswith("C"):
        return group.nearest(turn[None], torch.eye(3)[None])[0]
    axis = turn[2] * torch.sign(turn[2, 2] + 1e-12)
    z = axis.new_tensor([0.0, 0.0, 1.0])
    cross = torch.linalg.cross(axis, z)
    angle = torch.atan2(cross.norm(), axis[2])
    return rotation_from_vector(cross / cross.norm().clamp_min(1e-12) * angle)
