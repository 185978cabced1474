"""Fourier shell correlation by direction: what preferred views leave poorly resolved.

Conical FSC: the correlation of two half-maps on the part of each shell that lies within an angle of a direction (3DFSC:
Tan et al. 2017; half-angle 20° and ratio of areas as in cryoSPARC's orientation diagnostics, its definition alone).
A direction is one of Fourier space, in the frame of the map: views along d fill the plane across d and leave the cone
around d empty.
"""

import csv
import io
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import rfft3_centred
from scalecryo.physics.fsc import check_same_box, shell_index_3d

DIRECTIONS = 128  # on the half sphere: neighbours are 14° apart, less than a cone's half-angle
HALF_ANGLE_DEG = 20.0
CHUNK = 1 << 16  # coefficients compared with all directions at a time
THRESHOLD = 0.143
# A cone is a sixteenth of a shell, so the worst of 128 scatters, the more the fewer shells there are: half-maps whose
# signal knew no direction (boxes 48 to 96, masks of 0.4 to 0.6 of the box across, 75 pairs resolved to shell 12 or
# beyond) had worst cones of up to 1 + 16 / shell times the whole map's resolution; two, of shells 14 and 15, more.
WORST_RATIO, SCATTER_SHELLS, LEAST_SHELL = 1.5, 16.0, 15
UNEVEN = 0.5  # area ratio below which cryoSPARC's guide speaks of preferred orientations («Orientation Diagnostics»)


def cone_directions(count: int = DIRECTIONS) -> Float[Tensor, "d 3"]:
    """Unit vectors (x, y, z) spread evenly over the half sphere z > 0 (Fibonacci spiral); Friedel's law gives the rest.

    Every vector stands for the same solid angle.
    """
    number = torch.arange(count, dtype=torch.float64)
    height = (number + 0.5) / count
    turn = number * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height], 1)


def cone_fsc(
    a: Float[Tensor, "n n n"],
    b: Float[Tensor, "n n n"],
    directions: Float[Tensor, "d 3"],
    half_angle_deg: float = HALF_ANGLE_DEG,
) -> Float[Tensor, "d n//2+1"]:
    """Correlation of two maps on shells 0 .. n/2 within a double cone around each direction, double precision.

    Where a cone holds no coefficient of a shell (only the lowest shells), it gets the whole shell's correlation; where
    one of the maps is empty there, 0.

    Args:
        a, b: maps, [z, y, x].
        directions: unit vectors (x, y, z).
        half_angle_deg: between a cone's axis and its surface; 90: the whole shell.

    Raises:
        InputError: the maps differ in box size, or the box is odd.
    """
    check_same_box(a, b)
    box_size, half = a.shape[-1], a.shape[-1] // 2
    inside = shell_index_3d(box_size, a.device) <= half
    kz, ky, kx = inside.nonzero(as_tuple=True)
    shell = shell_index_3d(box_size, a.device)[inside]
    axis = [torch.where(k > half, k - box_size, k).double() for k in (kx, ky, kz)]
    unit = torch.nn.functional.normalize(torch.stack(axis, 1))
    first, second = rfft3_centred(a)[inside], rfft3_centred(b)[inside]
    # Columns kx = 0 and kx = n/2 are their own Friedel partners.
    weight = torch.where((kx == 0) | (kx == half), 1.0, 2.0).double()
    cross = first.real * second.real + first.imag * second.imag
    values = torch.stack([cross, first.abs().square(), second.abs().square(), torch.ones_like(cross)], 1).double()
    values = values * weight[:, None]
    sums = values.new_zeros(half + 1, len(directions) + 1, 4)  # the last "direction" is the whole shell
    order = shell.argsort(stable=True)
    ends = torch.bincount(shell, minlength=half + 1).cumsum(0).tolist()  # host sync: once per pair of maps
    least = math.cos(math.radians(half_angle_deg)) - 1e-9  # rounding must not drop what lies on the surface
    axes = directions.to(unit).T
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for rows in order[begin:end].split(CHUNK):
            within = ((unit[rows] @ axes).abs() >= least).double()
            sums[number, :-1] += within.T @ values[rows]
            sums[number, -1] += values[rows].sum(0)
    power = sums[..., 1] * sums[..., 2]
    curves = torch.where(power > 0, sums[..., 0] / power.clamp_min(torch.finfo(power.dtype).tiny).sqrt(), 0.0)
    return torch.where(sums[..., 3] > 0, curves, curves[:, -1:])[:, :-1].T


@dataclass(frozen=True, eq=False)
class ConicalFsc:
    """Correlations of two half-maps by direction, and what they say.

    Attributes:
        directions: unit vectors (x, y, z) of Fourier space, in the frame of the map.
        curves: of each direction, by integer shell.
        box_size: px.
        pixel_size: Å.
        angstrom: resolution of the whole map.
    """

    directions: Float[Tensor, "d 3"]
    curves: Float[Tensor, "d shells"]
    box_size: int
    pixel_size: float
    angstrom: float

    @cached_property
    def resolutions(self) -> Float[Tensor, " d"]:
        """Å at which each direction's curve falls below 0.143.

        Read as a change point: where the sum of (FSC - 0.143) over the shells before is largest. For a falling curve
        that is the crossing; single shells, of which a cone holds few coefficients, do not decide it.
        """
        inner = self.curves[:, 1 : self.box_size // 2] - THRESHOLD
        last = inner.cumsum(1).argmax(1)
        following = (last + 1).clamp_max(inner.shape[1] - 1)
        rows = torch.arange(len(inner), device=inner.device)
        above, below = inner[rows, last], inner[rows, following]
        falls = (above > 0) & (below < 0)
        part = torch.where(falls, above / (above - below).clamp_min(1e-12), 0.0)
        return self.box_size * self.pixel_size / (last + 1 + part)

    @property
    def worst(self) -> int:
        """Index of the direction that is resolved worst."""
        return int(self.resolutions.argmax())

    @property
    def worst_angstrom(self) -> float:
        """Resolution in that direction, Å."""
        return float(self.resolutions[self.worst])

    @property
    def worst_ratio(self) -> float:
        """That resolution over the whole map's; 1: alike."""
        return self.worst_angstrom / self.angstrom

    @cached_property
    def area_ratio(self) -> float:
        """Smallest over largest area under the directions' curves (cFAR); 1: all directions alike."""
        area = self.curves[:, 1 : self.box_size // 2].clamp(0, 1).mean(1)
        return float(area.min() / area.max().clamp_min(1e-12))

    @property
    def angles_deg(self) -> Float[Tensor, "d 2"]:
        """Each direction as rlnAngleRot and rlnAngleTilt of the view along it, degrees."""
        x, y, z = self.directions.unbind(1)
        return torch.rad2deg(torch.stack([torch.atan2(y, x), torch.arccos(z.clamp(-1, 1))], 1))

    @property
    def summary(self) -> str:
        """The worst cone in a few words."""
        return f"worst cone {self.worst_angstrom:.2f} Å ({self.worst_ratio:.2f} ×)"

    @property
    def warning(self) -> str | None:
        """One line where a direction is resolved much worse than the map and chance does not explain it, or None."""
        shell = self.box_size * self.pixel_size / self.angstrom
        if shell < LEAST_SHELL or self.worst_ratio < max(WORST_RATIO, 1 + SCATTER_SHELLS / shell):
            return None
        rot, tilt = self.angles_deg[self.worst].tolist()
        return (
            f"the map is resolved to {self.angstrom:.2f} Å, but only to {self.worst_angstrom:.2f} Å around rot "
            f"{rot:.0f}°, tilt {tilt:.0f}° of Fourier space (area under the cones' FSC, smallest to largest: "
            f"{self.area_ratio:.2f}): views across that direction are too few, or show no particle; see fsc_cones.png "
            "and orientations.png"
        )

    @property
    def uneven(self) -> bool:
        """Whether directions differ so much that the whole map's resolution says little."""
        return self.warning is not None and self.area_ratio < UNEVEN

    @property
    def text(self) -> str:
        """What the cones are and say, for a report."""
        rot, tilt = self.angles_deg[self.worst].tolist()
        lines = [
            f"{len(self.curves)} cones of {HALF_ANGLE_DEG:g}° around directions of Fourier space, masked, corrected",
            f"{self.summary}, around rot {rot:.0f}°, tilt {tilt:.0f}°; whole map {self.angstrom:.2f} Å",
            f"smallest to largest area under their curves (cFAR): {self.area_ratio:.2f}",
        ]
        return "\n".join([*lines, f"WARNING: {self.warning}"] if self.warning else lines)

    def table(self) -> str:
        """fsc_cones.csv: a line for each direction."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        shells = range(1, self.box_size // 2)
        writer.writerow(["x", "y", "z", "rot", "tilt", "resolution_angstrom", *(f"fsc_shell_{s}" for s in shells)])
        columns = [self.directions, self.angles_deg, self.resolutions[:, None], self.curves[:, 1 : self.box_size // 2]]
        for values in torch.cat([column.cpu().double() for column in columns], 1).tolist():
            writer.writerow([f"{value:.4f}" for value in values])
        return text.getvalue()
