"""Rotational search and refinement of one map onto another, hand included.

Both maps are compared on central slices of the truth, by the mean of their Fourier shell correlation: first over a grid
on SO(3) at a few Fourier pixels, then by BFGS at rising resolution. Conventions as in `align`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.local_minima import local_minima
from scalecryo.physics.fft import FourierPixels, fourier_pixels, fourier_resize_3d, irfft3_centred, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.rotation import geodesic_angle, rotation_from_vector
from scalecryo.physics.so3_grid import so3_grid

_PADDING = 2.0
_GRID = 4608
_SEARCH_RADIUS = 6.0
# Candidates of the search in each hand; radii of refinement (cycles per box), evaluations, and how many go on after.
_CANDIDATES = 12
_RADII = ((10.0, 12, 6), (20.0, 25, 2), (40.0, 25, 1), (math.inf, 25, 1))
_SYMMETRY_RADIUS, _SMALLEST_DEG = 16.0, 30.0  # of a map's own operations: shells, turn
SYMMETRIC = 0.8  # agreement with itself of a map that counts as symmetric


def mirror(volume: Float[Tensor, "n n n"]) -> Float[Tensor, "n n n"]:
    """V(x, y, −z) about the centre at index n//2 of an even box."""
    return volume.flip(0).roll(1, 0)


def apply_alignment(volume: Float[Tensor, "n n n"], alignment: Alignment) -> Float[Tensor, "n n n"]:
    """The estimated map where the truth is: V'(Qᵀ (y − u)), sampled anew.

    Trilinear in Fourier space, on the gridding-corrected transform of the map padded twice, up to shell n/2 − 1, so
    that fine detail is not blurred as it would be by interpolating voxels.
    """
    own = mirror(volume) if alignment.mirrored else volume
    return linear_map(own, alignment.rotation.mT.float(), alignment.shift_px.float())


def linear_map(
    volume: Float[Tensor, "n n n"], inverse: Float[Tensor, "3 3"], shift_px: Float[Tensor, "3"] | None = None
) -> Float[Tensor, "n n n"]:
    """V(A⁻¹ (y − u)), sampled anew as in `apply_alignment`, but for the factor |det A|.

    Args:
        volume: V.
        inverse: A⁻¹.
        shift_px: u, px; None: none.
    """
    n = volume.shape[-1]
    padded = padded_box(n, _PADDING)
    source = rfft3_centred(volume.float() * gridding_correction(n, _PADDING, volume.device), padded)
    line = torch.fft.fftfreq(n, 1 / n, device=volume.device)
    ky, kx = torch.meshgrid(line, torch.arange(n // 2 + 1.0, device=volume.device), indexing="ij")
    one, zero = torch.ones(1, device=volume.device), torch.zeros(1, device=volume.device)
    forward = torch.linalg.inv(inverse).float()  # at k the transform is that of V at Aᵀ k
    result = torch.zeros(n, n, n // 2 + 1, dtype=source.dtype, device=volume.device)
    for plane, kz in enumerate(line):
        place = torch.stack([kx, ky, kz.expand_as(kx)], dim=-1).flatten(0, 1)
        asked = place @ forward
        inside = (place.norm(dim=-1) <= n / 2 - 0.5) & (asked.norm(dim=-1) <= n / 2 - 0.5)
        # A slice of one pixel at (1, 0) whose "rotation" has the place as its first column is a sample at that place.
        columns = torch.nn.functional.pad(asked[inside][:, :, None], (0, 2))
        values = extract_slices(source, columns, one, zero, padded / n)[:, 0]
        if shift_px is not None:
            phase = (-2 * math.pi / n) * (place[inside] @ shift_px)
            values = values * torch.polar(torch.ones_like(phase), phase)
        result[plane].view(-1)[inside.nonzero()[:, 0]] = values
    return irfft3_centred(result, n)


def offset(volume: Float[Tensor, "n n n"], truth: Float[Tensor, "n n n"]) -> Float[Tensor, "3"]:
    """Whole pixels (x, y, z) by which a map, turned as the truth is, moves onto it: the peak of their correlation."""
    n = truth.shape[-1]
    spectra = torch.fft.rfftn(truth.double()) * torch.fft.rfftn(volume.double()).conj()
    peak = int(torch.fft.irfftn(spectra, s=truth.shape).argmax())
    z, y, x = ((index + n // 2) % n - n // 2 for index in (peak // n**2, peak // n % n, peak % n))
    return torch.tensor([x, y, z], dtype=torch.float32)


def align_maps(
    volume_est: Float[Tensor, "n n n"],
    volume_true: Float[Tensor, "m m m"],
    initial: Sequence[Alignment] = (),
    search: bool = True,
) -> Alignment:
    """The rotation, hand and shift that bring an estimated map onto the true one.

    Args:
        volume_est: the estimate.
        volume_true: the truth, of the same box.
        initial: alignments to start from, e.g. of the poses.
        search: whether to try all rotations in both hands as well (4,608 a hand).

    Raises:
        InputError: the boxes differ, or there is nothing to start from.
    """
    if volume_est.shape != volume_true.shape:
        raise InputError(
            f"cannot align boxes {tuple(volume_est.shape)} and {tuple(volume_true.shape)}: resize one to the other"
        )
    if not search and not initial:
        raise InputError("an alignment needs a search or something to start from: give one of the two")
    candidates: list[Alignment] = []
    comparisons: dict[bool, SliceComparison] = {}
    for mirrored in (False, True):
        own = mirror(volume_est) if mirrored else volume_est
        comparison = comparisons[mirrored] = SliceComparison(own, volume_true)
        candidates += [start for start in initial if start.mirrored == mirrored]
        if search:
            candidates += [
                Alignment(rotation, mirrored, shift, score) for rotation, shift, score in comparison.search(_CANDIDATES)
            ]
    for radius, evaluations, keep in _RADII:
        candidates = [
            found
            for mirrored, comparison in comparisons.items()
            for found in comparison.refine([one for one in candidates if one.mirrored == mirrored], radius, evaluations)
        ]
        candidates = sorted(candidates, key=lambda found: -found.score)[:keep]
        if radius >= volume_true.shape[-1] / 2:
            break
    return candidates[0]


def rotational_symmetry(volume: Float[Tensor, "n n n"]) -> Float[Tensor, "g 3 3"]:
    """Rotations S of `symmetry_operations`, the identity first."""
    return torch.stack([found.rotation.mT for found in symmetry_operations(volume)])


def symmetry_operations(
    volume: Float[Tensor, "n n n"], others: Float[Tensor, "e 3 3"] | None = None, *, least: float = SYMMETRIC
) -> list[Alignment]:
    """How a map lies on itself, the identity first: with S = Qᵀ, V(S (x − u)) ≈ V(x), its symmetry or pseudo-symmetry.

    The shift u, px, is none where the axis goes through the box's centre. An operation counts when the mean shell
    correlation of the map with its moved self over shells 1 to 16 (or the box's last) reaches `least` and its rotation
    is not within 30° of the identity, or 10° of others that are known already.
    """
    # A box that holds the shells in question is enough, and quick.
    small = fourier_resize_3d(volume, min(volume.shape[-1], 3 * int(_SYMMETRY_RADIUS)))
    comparison = SliceComparison(small, small)
    found = [Alignment(torch.eye(3), False, torch.zeros(3), 1.0)]
    beside = torch.eye(3)[:0].view(0, 3, 3) if others is None else others.mT
    starts = [Alignment(turn, False, shift, 0.0) for turn, shift, _ in comparison.search(40, away_deg=_SMALLEST_DEG)]
    known = torch.cat([found[0].rotation[None], beside])
    # A quick look first: most starts end at a rotation that is known already, or at none.
    for radius, evaluations, enough in ((_RADII[0][0], 12, least - 0.2), (_SYMMETRY_RADIUS, 25, least)):
        starts = [
            one
            for one in comparison.refine(starts, radius, evaluations)
            if one.score >= enough and _angles(one, known[:1])[0] >= _SMALLEST_DEG
        ]
        starts = _apart(starts, known)
    found += starts
    return [replace(one, shift_px=one.shift_px * (volume.shape[-1] / small.shape[-1])) for one in found]


def _angles(alignment: Alignment, known: Float[Tensor, "k 3 3"]) -> list[float]:
    """Degrees between its rotation and those known."""
    return geodesic_angle(known, alignment.rotation.expand_as(known)).tolist()


def _apart(alignments: Sequence[Alignment], known: Float[Tensor, "k 3 3"]) -> list[Alignment]:
    """Those whose rotation is not within 10° of one that is known or of an earlier one's."""
    kept: list[Alignment] = []
    for one in alignments:
        if min(_angles(one, torch.cat([known, *(other.rotation[None] for other in kept)]))) >= 10:
            kept.append(one)
    return kept


def compare_turned(
    volume: Float[Tensor, "n n n"], truth: Float[Tensor, "n n n"], starts: Sequence[Alignment], radius: float
) -> list[float]:
    """Mean shell correlation up to a radius (Fourier pixels) of a map with another one, at the best alignment near each
    start."""
    box = min(volume.shape[-1], 2 * math.ceil(radius + 2))
    comparison = SliceComparison(fourier_resize_3d(volume, box), fourier_resize_3d(truth, box))
    scale = box / volume.shape[-1]
    starts = [replace(start, shift_px=start.shift_px * scale) for start in starts]
    return [one.score for one in comparison.refine(starts, min(radius, box / 2 - 1), 15)]


@dataclass(frozen=True)
class Planes:
    """Central slices of the truth up to some radius, and where they lie."""

    pixels: FourierPixels
    turn: Float[Tensor, "c 3 3"]
    truth: Complex[Tensor, "c p"]
    place: Float[Tensor, "c p 3"]


class SliceComparison:
    """An estimate (already mirrored where it should be) and a truth, compared by shells on central slices."""

    def __init__(self, volume_est: Float[Tensor, "n n n"], volume_true: Float[Tensor, "n n n"]) -> None:
        self.box_size = volume_true.shape[-1]
        padded = padded_box(self.box_size, _PADDING)
        self._scale = padded / self.box_size
        self._pixels = fourier_pixels(self.box_size)
        correction = gridding_correction(self.box_size, _PADDING)
        self._estimate = rfft3_centred(volume_est.float() * correction, padded)
        self._truth = rfft3_centred(volume_true.float() * correction, padded)

    def planes(self, count: int, radius: float) -> Planes:
        """So many slices of the truth up to a radius (Fourier pixels), in directions spread over all."""
        pixels = self._pixels.prefix(min(radius, self.box_size / 2 - 1))
        turn = so3_grid(count)
        truth = extract_slices(self._truth, turn, pixels.kx, pixels.ky, self._scale)
        place = torch.stack([pixels.kx, pixels.ky], dim=-1) @ turn[:, :, :2].mT
        return Planes(pixels, turn, truth, place)

    def slices(self, rotation: Float[Tensor, "b 3 3"], planes: Planes) -> Complex[Tensor, "b c p"]:
        """The estimate at Qᵀ k for the places k of the planes."""
        turned = (rotation.mT[:, None] @ planes.turn).flatten(0, 1)
        values = extract_slices(self._estimate, turned, planes.pixels.kx, planes.pixels.ky, self._scale)
        return values.unflatten(0, (len(rotation), -1))

    def curves(
        self, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 3"], planes: Planes
    ) -> Float[Tensor, "b s"]:
        """Shell correlations, DC first, of the truth and the estimate turned by each Q and moved by its u."""
        values = self.slices(rotation, planes)
        phase = torch.einsum("cpi,bi->bcp", planes.place, shift_px) * (-2 * math.pi / self.box_size)
        moved = values * torch.polar(torch.ones_like(phase), phase)
        cross = _shell_sums(moved.real * planes.truth.real + moved.imag * planes.truth.imag, planes)
        power = _shell_sums(moved.abs().square(), planes) * _shell_sums(planes.truth.abs().square()[None], planes)
        return cross / power.clamp_min(torch.finfo(power.dtype).tiny).sqrt()

    def search(self, count: int, away_deg: float = 0.0) -> list[tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], float]]:
        """The `count` best rotations of a grid, at least 20° apart, each with its best shift (px) and a score.

        Shifts up to an eighth of the box along each axis, radius 6 in Fourier space; two matrix products. Rotations by
        less than `away_deg` are left out.
        """
        planes = self.planes(12, _SEARCH_RADIUS)
        step = torch.arange(-2.0, 3.0) * self.box_size / 16
        shifts = torch.cartesian_prod(step, step, step)
        phase = (planes.place.flatten(0, 1) @ shifts.T) * (-2 * math.pi / self.box_size)
        truth = whitened(planes.truth[None], planes)[0].conj()
        weight = planes.pixels.weight * (planes.pixels.shell > 0)
        ramps = torch.polar((weight / (weight.sum() * len(planes.turn))).repeat(len(planes.turn))[:, None], phase)
        rotations = so3_grid(_GRID)
        scores = []
        for some in rotations.split(512):
            products = (whitened(self.slices(some, planes), planes) * truth).flatten(1)
            scores.append(products.real @ ramps.real - products.imag @ ramps.imag)
        score, best = torch.cat(scores).max(dim=1)
        angle = geodesic_angle(rotations, torch.eye(3).expand_as(rotations))
        score = torch.where(angle < away_deg, -1.0, score)
        found: list[tuple[Tensor, Tensor, float]] = []
        while len(found) < count and float(score.max()) > -1:
            top = int(score.argmax())
            found.append((rotations[top], shifts[best[top]], float(score[top])))
            near = geodesic_angle(rotations, rotations[top].expand_as(rotations)) < 20
            score = torch.where(near, -1.0, score)
        return found

    def refine(self, starts: Sequence[Alignment], radius: float, evaluations: int) -> list[Alignment]:
        """Local maxima near each start of the mean shell correlation up to a radius (cycles per box), by BFGS on
        so(3) × R³."""
        if not starts:
            return []
        planes = self.planes(24, radius)
        reach = planes.pixels.radius_limit
        first = torch.stack([start.rotation.float() for start in starts])
        origin = torch.stack([start.shift_px.float() for start in starts])

        def poses(step: Tensor) -> tuple[Tensor, Tensor]:
            # A step of one moves the outermost pixels by about one cycle in either kind of parameter.
            turn = rotation_from_vector(step[:, :3] / reach)
            return turn @ first, origin + step[:, 3:] * (self.box_size / (2 * math.pi * reach))

        def cost(step: Tensor) -> Tensor:
            return -self.curves(*poses(step), planes)[:, 1:].mean(1)

        rotation, shift = poses(local_minima(cost, torch.zeros(len(starts), 6), evaluations))
        scores = self.curves(rotation, shift, planes)[:, 1:].mean(1)
        return [
            Alignment(turn, start.mirrored, moved, float(score))
            for start, turn, moved, score in zip(starts, rotation, shift, scores, strict=True)
        ]


def _shell_sums(values: Float[Tensor, "b c p"], planes: Planes) -> Float[Tensor, "b s"]:
    """Sums over each shell of all planes."""
    weighted = (values * planes.pixels.weight).sum(1)
    empty = torch.zeros(len(values), int(planes.pixels.radius_limit + 0.5) + 1)
    return empty.index_add(1, planes.pixels.shell, weighted)


def whitened(values: Complex[Tensor, "b c p"], planes: Planes) -> Complex[Tensor, "b c p"]:
    """Values over the root mean square of their shell."""
    shell, weight = planes.pixels.shell, planes.pixels.weight
    size = int(planes.pixels.radius_limit + 0.5) + 1
    power = values.abs().square().mean(1) * weight
    mean = torch.zeros(len(values), size).index_add(1, shell, power) / torch.zeros(size).index_add(0, shell, weight)
    return values / mean.clamp_min(1e-30).sqrt()[:, shell][:, None]
