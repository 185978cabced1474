"""Who poses the particles in the final pass: references, or the auto-encoder itself."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.errors import TrainingError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import align_maps
from scalecryo.evaluate.symmetry_axes import on_the_axes
from scalecryo.map.reference import ReferenceSet
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.candidate_sources import CandidateSource, SearchSource, finer_grid
from scalecryo.pose.estimator import EStepPlan, PoseEstimator, map_weight
from scalecryo.pose.related import RelatedRotations
from scalecryo.runs.pictures import EXAMPLES, Pairs, correlation, pictures_of
from scalecryo.train.encoder_training import MODES, PoseLearner
from scalecryo.train.particle_source import RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stages.on_axes import moved_poses
from scalecryo.train.stages.schedule import FIRST_PASSES, PASSES, PROBABILITY_RADIUS, SEARCH_RADIUS
from scalecryo.train.stages.start_rounds import HALF_GRID

# Radius and passes of the local refinement of a particle never seen, and the passes at the last radius. Measured on G
# with shifts: as accurate as 2 last passes and a tenth of the gain, in half the time.
FIRST_STEPS, LAST_PASSES = ((12.0, FIRST_PASSES), (28.0, 1)), 1
PRUNE_FRACTION = 0.03  # of the best mode's gain


class FinalPoses(Protocol):
    """Poses of particles that stream by."""

    pixels: FourierPixels
    """Of the level that it wants to see."""
    notes: tuple[str, ...]
    """What a person should know of the map that poses are found with."""

    def estimate(self, images: ParticleImages) -> PoseEstimates:
        """Poses of a batch at that level."""

    def weight(self, found: PoseEstimates) -> Tensor:
        """Of each particle in the maps, 0 … 1."""

    def pictures(self, images: ParticleImages, found: PoseEstimates, at: Int[Tensor, " k"]) -> Pairs:
        """A few images of the batch that was estimated last, of the first half, and their predictions."""


class ReferencePoses:
    """Poses by local refinement against each half's own reference, from what is remembered, else from a search.

    The second half's frame is laid onto the first's, so that poses and maps agree.
    """

    def __init__(
        self,
        context: RunContext,
        references: ReferenceSet,
        remembered: ParticleState | None,
        encoder: PoseLearner | None,
        shift_radius: float | None = None,
        *,
        labels_stay: bool = False,
    ) -> None:
        """
        Args:
            context: of the run.
            references: of the last iteration.
            remembered: poses of the particles seen before; None: every particle is new.
            encoder: that finds new particles' modes; None: they are searched.
            shift_radius: largest shift that is searched, Å; None: that of the settings.
            labels_stay: whether remembered classes are kept.
        """
        level = references.level
        self.pixels = context.pixels(level)
        self._remembered, self._seed = remembered, context.config.train.seed
        self._generator = torch.Generator()
        radius = min(references.radius, level / 2 - 1)
        group = context.point_group
        related = RelatedRotations.of_classes(references, group)
        told = related[0].told(group) if references.classes == 1 else ""
        self.notes: tuple[str, ...] = (told,) if told else ()
        steps = tuple((at, passes) for at, passes in FIRST_STEPS if at < radius)
        plan = EStepPlan(
            radius=radius,
            passes=PASSES if remembered is not None else 0,
            search_known=False,
            steps=(*steps, (radius, LAST_PASSES)),
            prune_fraction=PRUNE_FRACTION,
            fit_shift=context.fit_shift,
            probability_radius=min(PROBABILITY_RADIUS, radius),
            shift_radius=shift_radius or context.shift_radius,
            equivalent=tuple(own.equivalent for own in related),
            labels_stay=labels_stay,
        )
        self._encoder, self._references = encoder, references
        source: CandidateSource
        if encoder is not None:
            source = encoder.source(references)
        else:
            grid = so3_grid(HALF_GRID * finer_grid(group)).to(context.device)
            shifts = context.shift_grid_px(level, shift_radius or context.shift_radius)
            source = SearchSource(grid, min(SEARCH_RADIUS, radius), shifts, MODES, self._generator, group=group)
        prepared = references.at(level, self.pixels)
        self._estimator = PoseEstimator(prepared, plan, source, context.world.timer)
        self._pixel_size = references.pixel_size
        self._onto_first = [
            lay_onto(second, first, own.moves, group)
            for (first, second), own in zip(references.maps, related, strict=True)
        ]

    def estimate(self, images: ParticleImages) -> PoseEstimates:
        """Remembered poses refined once more; the others searched, then refined at rising radii."""
        # The turned grids of a search depend on the batch alone: a resumed pass finds the same.
        self._generator.manual_seed(self._seed + int(images.rows[0]))  # host sync
        if self._remembered is not None:
            known, seen = self._remembered.read(images.rows)
        else:
            known = PoseEstimates.unknown(len(images), images.rows.device)
            seen = torch.zeros(len(images), dtype=torch.bool, device=images.rows.device)
        found = self._estimator.estimate(images, known, seen)
        for number, alignment in enumerate(self._onto_first):
            at = ((images.half == 2) & (found.class_index == number)).nonzero()[:, 0]  # host sync
            if len(at):
                found = found.put(at, moved_poses(found.select(at), alignment, self._pixel_size))
        return found

    def weight(self, found: PoseEstimates) -> Tensor:
        """An image that shows no particle hardly enters the maps."""
        return map_weight(found)

    def pictures(self, images: ParticleImages, found: PoseEstimates, at: Int[Tensor, " k"]) -> Pairs:
        """By the first half's map."""
        few, predicted = self._estimator.predictions(images.select(at), found.select(at), EXAMPLES, half=1)
        return pictures_of(few.transforms, predicted, self.pixels)

    def encoder_rotation(self, images: ParticleImages) -> Tensor:
        """Rotations by the encoder alone, one forward pass and nothing else.

        Raises:
            TrainingError: the run has no encoder.
        """
        if self._encoder is None:
            raise TrainingError("this run has no encoder: train it with guided.encoder_steps >= 1")
        return self._encoder.own_poses(images, self._references).rotation


def lay_onto(
    moving: Float[Tensor, "n n n"], fixed: Float[Tensor, "n n n"], moves: Sequence[Alignment], group: PointGroup | None
) -> Alignment:
    """How one half-map turns and moves onto the other: a little, or by one of its pseudo-symmetries as well.

    Both have the axes of the point group: of what turns and moves little, only what keeps them is left.

    Args:
        moving: the map that is turned.
        fixed: the other one.
        moves: how the map nearly lies on itself.
        group: of the run; None: C1.
    """
    centred = Alignment(torch.eye(3), False, torch.zeros(3), 0.0)
    if not bool(moving.any()) or not bool(fixed.any()):  # a class that holds nothing
        return centred
    found = align_maps(moving.cpu(), fixed.cpu(), [centred, *moves], search=False)
    return found if group is None else on_the_axes(found, group)


class ModelPoses:
    """Poses by the auto-encoder's own pose source: encoder, table or known."""

    def __init__(self, context: RunContext, model: AutoEncoder) -> None:
        """
        Args:
            context: of the run.
            model: trained.
        """
        self.pixels = context.pixels(model.volume.box_size)
        self.notes: tuple[str, ...] = ()
        self._model = model
        # A pose table knows only the rows that it was trained on.
        limited = context.config.pose.source == "table" and context.config.train.rows
        self._rows = context.config.train.rows if limited else context.store.count
        self._output: AutoEncoderOutput | None = None

    def estimate(self, images: ParticleImages) -> PoseEstimates:
        """One forward pass."""
        usable = (images.rows < self._rows).float()
        self._output = output = self._model(images)
        fit = correlation(images.transforms, output.predicted, images.pixels.weight)
        return PoseEstimates(
            rotation=output.poses.rotation,
            shift=output.poses.shift,
            class_index=torch.zeros(len(images), dtype=torch.long, device=images.rows.device),
            class_probability=torch.ones_like(fit),
            confidence=fit,
            particle_probability=usable,
            log_likelihood=-output.loss,
        )

    def weight(self, found: PoseEstimates) -> Tensor:
        """Every image whose pose is known enters the maps alike."""
        return found.particle_probability

    def pictures(self, images: ParticleImages, found: PoseEstimates, at: Int[Tensor, " k"]) -> Pairs:
        """By the model."""
        assert self._output is not None, "estimate() comes first"
        return pictures_of(images.transforms[at], self._output.predicted[at], images.pixels)
