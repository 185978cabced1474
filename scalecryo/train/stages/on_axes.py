"""Between the start and the first iteration: where the axes of a given point group lie, and all turned onto RELION's.

The start knows of no symmetry: imposed on noise it would lock in whatever axes chance gave. Each class of a start that
knows several has axes of its own.
"""

import logging
import math
from dataclasses import replace

import torch

from scalecryo.errors import TrainingError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment, symmetry_operations
from scalecryo.evaluate.symmetry_axes import SymmetryAxes, symmetrised_map, symmetry_axes
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.fsc import shell_index_3d
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.symmetry import PointGroup, generated_group
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned

logger = logging.getLogger(__name__)
ROWS = 20_000
FLOOR = 1e-2  # of the mean weight, that is added where a map is compared with images
SHOWN = 0.5  # correlation of the halves down to which shells are compared
# Agreement under the group over that of the halves. Measured: the particle's own groups 0.96 to 1.04 (GroEL D7, C7, C2;
# spike C3; T, D2, C3), others 0.12 to 0.39 (D6, D14, C8, T; C4, D3; O).
REFUSED, DOUBTED = 0.7, 0.9
# Agreement of images with the map made symmetric over that with the map: measured 1.08 to 1.20 under the particle's own
# groups (D2; T, C3; I), poses in one asymmetric unit, and 0.41 to 0.84 under others.
ON_AXES = 0.97


def put_on_axes(context: RunContext, learned: Learned) -> None:
    """Lay references and remembered poses onto the axes of the run's point group, and impose it. Collective.

    Raises:
        TrainingError: no map agrees with itself under the group.
    """
    group, references = context.point_group, learned.references
    if group is None or references is None:
        return
    held = [number for number in range(references.classes) if float(references.mean(number).amax()) > 0]  # host sync
    found = {number: _found(references, number, group, context) for number in held}
    _judge(found, references, group, context, learned)
    maps, mask = torch.zeros_like(references.maps), references.mask.clone()
    if context.world.is_leader:
        for number, (axes, _) in found.items():
            for old, new in zip(references.maps[number], maps[number], strict=True):
                new.copy_(symmetrised_map(apply_alignment(old.cpu(), axes.alignment), group))
    context.world.all_reduce_(maps)  # worker 0's, to all
    if context.solvent is None:
        for number in held:
            mask[number] = mask_from_map(maps[number].mean(0), references.pixel_size)
    learned.references = replace(references, maps=maps, mask=mask)
    if references.classes == 1:  # a start of several classes leaves no poses
        _turn_poses(context, learned, found[0][0].alignment, references.pixel_size)


def _judge(
    found: dict[int, tuple[SymmetryAxes, float]],
    references: ReferenceSet,
    group: PointGroup,
    context: RunContext,
    learned: Learned,
) -> None:
    """Tell how well each map agrees with itself under the group; refuse the group where none does, doubt it where one
    does not.

    Raises:
        TrainingError: no map agrees with itself under the group.
    """
    share = {number: axes.agreement / max(expected, 1e-6) for number, (axes, expected) in found.items()}
    best = max(share, key=lambda number: share[number])
    for number, (axes, expected) in found.items():
        which = "the start's map" if references.classes == 1 else f"class {number + 1} of the start"
        told = f"{which} agrees with itself under {group.name} at {axes.agreement:.2f}, its halves at {expected:.2f}"
        if number == best and share[number] < REFUSED:
            raise TrainingError(f"{context.config.run.data}: {told}: {_advice(references, number)}")
        if share[number] < DOUBTED:
            doubt = f"{group.name} may be too high a symmetry"
            if share[number] < REFUSED:
                doubt = "it is made symmetric all the same, and may be junk or of another symmetry"
            note = f"{told}: {doubt}"
            learned.notes += (note,)
            logger.warning("%s", note)
        else:
            logger.info("%s", told)


def symmetric_where_on_axes(owned: OwnedSums, context: RunContext, references: ReferenceSet) -> bool:
    """Make sums symmetric where poses that came with the particles have the group's axes already. Collective.

    Poses of a refinement with symmetry may lie in one asymmetric unit. Their map lacks most of Fourier space, and does
    not agree with itself: but each half's images agree with the other half's symmetric map, where they are.

    Returns:
        Whether they were.
    """
    group, sums = context.point_group, owned.sums
    if group is None:
        return False
    symmetric, owner = sums, owned.owner(0)
    told = torch.zeros((), dtype=torch.float64, device=context.device)
    if context.world.rank == owner:
        symmetric, radius = sums.merged([0]), int(max(references.resolution(SHOWN)[0], 4.0))
        symmetric.symmetrise(group.others, sums.box_size / 2 - 1)
        told += _agreement(symmetric, sums, radius) / max(_agreement(sums, sums, radius), 1e-6)
    context.world.broadcast_(owner, told)
    share = float(told)  # host sync: once a run
    logger.info("imported poses: images agree with the map made symmetric about RELION's axes (%s) at %.2f of how they "
                "agree with the map", group.name, share)  # fmt: skip
    if share < ON_AXES:
        return False
    owned.sums = symmetric
    return True


def _agreement(model: Backprojection, images: Backprojection, radius: int) -> float:
    """Mean shell correlation of each half's images, as they were inserted, with the other half's map."""
    shells = (shell_index_3d(model.padded_box, model.denominator.device) / model.scale).round().long().flatten()
    curves = []
    for half in (0, 1):
        weight, power = model.denominator[0, half].flatten(), images.denominator[0, 1 - half].flatten()
        predicted = model.numerator[0, half].flatten() / (weight + FLOOR * weight.mean())
        seen = images.numerator[0, 1 - half].flatten()
        parts = torch.stack([
            (predicted.conj() * seen).real, power * predicted.abs().square(),
            seen.abs().square() / power.clamp_min(1e-20),
        ])  # fmt: skip
        parts = parts * (power > 0)
        total = parts.new_zeros(3, int(shells.max()) + 1).index_add_(1, shells, parts)  # host sync: once a run
        curves.append(total[0] / (total[1] * total[2]).clamp_min(1e-30).sqrt())
    return float(torch.stack(curves)[:, 2 : radius + 1].mean())


def _found(references: ReferenceSet, number: int, group: PointGroup, context: RunContext) -> tuple[SymmetryAxes, float]:
    """A class's axes by worker 0, to all, and the mean correlation of its halves over the same shells. Collective."""
    radius = _radius(references, number)
    told = torch.zeros(13, dtype=torch.float64)
    if context.world.is_leader:  # others might round otherwise
        volume = references.mean(number) * references.mask[number]
        centre = centre_of_mass(references.mean(number), references.mask[number])
        axes = symmetry_axes(volume, group, radius, centre)
        told = torch.cat([
            axes.alignment.rotation.flatten(), axes.alignment.shift_px, torch.tensor([axes.agreement])
        ]).double()  # fmt: skip
    told = told.to(context.device)
    context.world.all_reduce_(told)
    told = told.cpu().float()
    curve = references.curve(number)[2 : int(radius) + 1]
    alignment = Alignment(told[:9].view(3, 3), False, told[9:12], float(told[12]))
    return SymmetryAxes(alignment, float(told[12])), float(curve.mean())


def _radius(references: ReferenceSet, number: int) -> float:
    """Fourier pixels up to which a class's map is compared with itself."""
    return max(references.class_resolution(number, SHOWN)[0], 4.0)


def _advice(references: ReferenceSet, number: int) -> str:
    """What the map does show."""
    box = min(references.level, 2 * math.ceil(_radius(references, number) + 1))  # noise beyond agrees with nothing
    volume = fourier_resize_3d((references.mean(number) * references.mask[number]).cpu(), box)
    seen = generated_group([one.rotation for one in symmetry_operations(volume)])
    return "leave --symmetry out" if seen in (None, "C1") else f"try --symmetry {seen}, or leave it out"


def moved_poses(found: PoseEstimates, alignment: Alignment, pixel_size: float) -> PoseEstimates:
    """Poses as the map has them once it is laid elsewhere: Q R, and the shift less (R'ᵀ u)_xy."""
    rotation = alignment.rotation.to(found.rotation) @ found.rotation
    moved = (rotation.mT @ alignment.shift_px.to(rotation))[:, :2] * pixel_size
    return replace(found, rotation=rotation, shift=found.shift - moved)


def _turn_poses(context: RunContext, learned: Learned, alignment: Alignment, pixel_size: float) -> None:
    """Poses that came with the particles, each worker's share; kept in parts, so that a resumed run has them."""
    particles, world = learned.particles, context.world
    particles.begin("symmetry_axes")
    count = context.store.count
    for first in range(world.rank * ROWS, count, world.size * ROWS):
        rows = torch.arange(first, min(first + ROWS, count))
        known, seen = particles.read(rows)
        at = seen.nonzero()[:, 0]
        if len(at):
            moved = moved_poses(known.select(at), alignment, pixel_size)
            particles.note(rows[at], moved, torch.zeros_like(at))
    particles.commit(world)
