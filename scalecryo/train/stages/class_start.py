"""From random poses to K first maps: stochastic expectation maximisation over class and pose together.

As the start of one map (`bootstrap`), but the posterior of each image spreads over the poses of K maps. Both halves
learn the same K maps, so that classes need not be matched between them; their sums are kept apart, and what they share
tells how far each first map is to be believed. Each half then goes on by itself from there.

A map that is a little better than the others draws all images and becomes better still: with the evidence of tens of
nats that an image has for its pose, all but one class would be lost within the first steps, before any of them is a
structure. So for the first rounds every class gets the same share of the particles, by a prior that follows their
shares; then the prior is the share itself, and a class that explains nothing may become empty.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.classes import effective_classes
from scalecryo.evaluate.likeness import alike
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import ReferenceSet, reference_transform
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.class_posterior import FEW, ClassPosterior
from scalecryo.pose.expectation import expected_slices
from scalecryo.pose.search import turned_grid
from scalecryo.runs.monitor import PassReport
from scalecryo.train.owned_sums import tied_shares
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.checks import check_contrast
from scalecryo.train.stages.class_shares import Balance
from scalecryo.train.stages.on_axes import put_on_axes
from scalecryo.train.stages.start_rounds import DECAY, FIRST_REFERENCE_RADIUS, REGULARISATION, StartRounds

logger = logging.getLogger(__name__)
ROUNDS_EXPECTED = 9  # of most runs, for the time left
SETTLED = 1.02  # factor in likelihood gain over the last two rounds below which classes have settled
ALIKE, SHELLS = 0.9, slice(2, 9)  # of what two maps of one structure correlate by, over these shells: the same
SETTLED_AGAIN = 2  # rounds at least after maps were replaced
COUNTED = 0.01  # posterior of a class below which an image does not count for it
GIVEN = 10  # steps for which first maps that are known stay: so many that sums of batches hold as much as ever


class ClassStart(StartRounds):
    """K maps from each of several random starts; the held-out likelihood of the mixtures tells which goes on.

    The maps of a start are one *set*; set s holds its classes' sums from place s K on.
    """

    least_rounds = 4
    most_rounds: int | None = None  # None: `guided.bootstrap_rounds` alone
    _begins_with_maps = False
    balanced_rounds = 2  # in which every class gets the same share
    _imposed: PointGroup | None = None
    """About whose axes the first maps are symmetric, and so stay; None: no axes are known yet."""

    def __init__(
        self, context: RunContext, learned: Learned, *, classes: int = 0, starts: int = 0, sets: int = 0
    ) -> None:
        """
        Args:
            context: of the run.
            learned: gets the best start's references.
            classes: of each start; 0: as many as the settings say.
            starts: random starts; 0: as many as the settings say.
            sets: of maps that there is room for; the starts are the first of them.

        Raises:
            TrainingError: too few particles take part.
        """
        settings = context.config.guided
        starts = starts or settings.starts
        sets = max(sets, starts)
        self._classes = classes or context.config.train.classes
        # Both halves serve one map: half as many particles for each class as where each half has its own.
        batch = max(settings.bootstrap_batch, settings.bootstrap_batch * self._classes // 2)
        super().__init__(context, learned, batch=batch, maps=sets * self._classes)
        self._most = min(self.most_rounds or settings.bootstrap_rounds, settings.bootstrap_rounds)
        self._balance = Balance(sets, self._classes, context.device)
        self._going = list(range(starts))
        self._posteriors: dict[int, ClassPosterior] = {}
        self._few = so3_grid(self.half_grid // FEW).to(context.device)
        self._gains = torch.zeros(sets, 3, dtype=torch.float64, device=context.device)
        """Of each start's held-out particles: sum of the likelihood gains, of their squares, number."""
        self._since = 0  # round from which on classes settle
        self._joined = False

    def finish_pass(self, world: World) -> PassReport:
        """Say how far it is; after a round choose the best start, and end where nothing gets better. Collective.

        Raises:
            TrainingError: the maps explain held-out images no better than nothing, or the contrast is inverted.
        """
        (here, total), number = self._here, len(self._earlier) + 1
        message = f"start of {self._classes} classes, round {number}: {here} of {total} batches"
        judged = self._judged > 0
        if judged:
            message += f"; {self._choose(world)}"
            self._ended = self._ends(world)
            if self._ended:
                self._learned.references = self._first_references()
                if self._imposed is None:
                    put_on_axes(self._context, self._learned)
            self._judged = 0
        rounds = number - 1 + (1 if judged else here / total)
        share = 1.0 if self._ended else rounds / max(ROUNDS_EXPECTED, number + 1)
        return PassReport(message, self._images, checkpoint=not judged, progress=share)

    def _ends(self, world: World) -> bool:
        """Whether a round was the last; if not, what it leads to. Collective."""
        if not self._joined and not self._settled():
            return False
        # A class that shows what another shows goes; the other has a round to take over its particles.
        self._joined = not self._joined and self._join_alike(world)
        return not self._joined

    def _standing(self) -> dict[str, Any]:
        return super()._standing() | {"going": list(self._going), "since": self._since, "joined": self._joined}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._going = list(standing["going"])
        self._since, self._joined = int(standing["since"]), bool(standing["joined"])

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), *self._balance.tensors()]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        fresh, residuals = self._begin_step(batch, world)
        mass = self._gains.new_zeros(len(self._gains), self._classes)
        for start in self._going:
            mass[start] = self._insert(batch, start, fresh, residuals)
        self._end_step(world, fresh, residuals, mass, *self._beside())
        self._balance.add(mass, DECAY, even=self._even)

    @property
    def _even(self) -> bool:
        """Whether every class is still to get the same share."""
        return len(self._earlier) < self.balanced_rounds

    def _beside(self) -> Sequence[Tensor]:
        """What else a step sums up over the workers."""
        return ()

    def _insert(
        self, batch: ParticleImages, start: int, fresh: Backprojection, residuals: NoiseSpectrum
    ) -> Float[Tensor, " classes"]:
        """One step of one start on this worker: all images at all poses of all classes; the classes' posterior mass."""
        first, mass = start * self._classes, self._gains.new_zeros(self._classes)
        if self._step == 0 and not self._begins_with_maps:
            self._insert_at_random(batch.within(self.radius), start, fresh)
            return mass + len(batch) / self._classes
        if not len(batch):  # a worker that holds none still takes part in the reduction
            return mass
        grid, classes = turned_grid(self._grid, self._generator(start)), self._posterior(start)
        shares = self._shares(batch, start, classes)
        for half in (1, 2):
            at = batch.half == half
            images, share = batch.select(at).within(self.radius), shares[at]
            for number, bank in enumerate(classes.banks):
                own = (share[:, number] > COUNTED).nonzero()[:, 0]  # host sync
                if len(own):
                    some, counted = images.select(own), share[own, number]
                    self._insert_of_class(
                        some, counted, first + number, half, bank, grid, self._noise, fresh, residuals
                    )
            mass += share.sum(0)
            self._insert_beside(images, half, share, grid, fresh)
        return mass

    def _shares(self, batch: ParticleImages, start: int, classes: ClassPosterior) -> Float[Tensor, "b classes"]:
        """How much each image belongs to each class."""
        weight, prior = self._noise.pixel_weight(self._near), self._balance.log_prior[start]
        return classes.shares(batch.within(self.radius), weight, prior)

    def _insert_beside(
        self,
        images: ParticleImages,
        half: int,
        share: Float[Tensor, "b classes"],
        grid: Float[Tensor, "h 3 3"],
        fresh: Backprojection,
    ) -> None:
        """What else is learnt from the images of a half whose classes were found."""

    def _insert_of_class(
        self,
        images: ParticleImages,
        weight: Float[Tensor, " b"],
        place: int,
        half: int,
        bank: Complex[Tensor, "h p"],
        grid: Float[Tensor, "h 3 3"],
        noise: NoiseSpectrum,
        fresh: Backprojection,
        residuals: NoiseSpectrum,
    ) -> None:
        """Images at all poses of one map, by how much each belongs to it, whatever the other classes explain."""
        near = self._near
        found = expected_slices(
            images.transforms, images.ctf, noise.pixel_weight(near), bank, self._shifts, near, image_weight=weight
        )
        centred, ones = grid.new_zeros(len(grid), 2), grid.new_ones(len(grid))
        fresh.insert(found.slices, grid, centred, ones, near, class_index=place, half=half)
        residuals.add_power(found.residual, weight.sum(), near)

    def _insert_at_random(self, images: ParticleImages, start: int, fresh: Backprojection) -> None:
        """The first step: classes in turn, random poses, others on every worker."""
        count, device = len(images), images.rows.device
        rotation, shift = self._random_poses(count, start)
        index = start * self._classes + torch.arange(count, device=device) % self._classes
        weighted, ones = ctf_weighted(images.transforms, images.ctf), torch.ones(count, device=device)
        fresh.add(weighted, rotation, shift, ones, images.half, self._near, index)

    def _posterior(self, start: int) -> ClassPosterior:
        """Over a start's present maps, at this step's turn of the grid."""
        scale = self._sums.scale
        transforms = [reference_transform(solved, scale) for solved in self._solved(start)]
        grid, few = (turned_grid(own, self._generator(start)) for own in (self._grid, self._few))
        return ClassPosterior(transforms, scale, grid, few, self._shifts, self._near)

    def _solved(self, start: int) -> list[Float[Tensor, "n n n"]]:
        """The present maps of a start's classes, from both halves."""
        return [self._joint_map(start * self._classes + number) for number in range(self._classes)]

    def _joint_map(self, place: int) -> Float[Tensor, "n n n"]:
        """The present map at a place of the sums, from both halves."""
        return self._sums_at(place).joined().solve_one(0, 1, REGULARISATION)

    @property
    def _given(self) -> bool:
        """Whether first maps that are known still stand: the sums of a batch or two show no small class."""
        return self._begins_with_maps and self._step < min(GIVEN, self._steps)

    def _halves(self, place: int) -> list[Float[Tensor, "n n n"]]:
        """The present half-maps at a place of the sums."""
        own = self._sums_at(place)
        return [own.solve_one(0, half, REGULARISATION) for half in (1, 2)]

    def _to_compare(self, places: Sequence[int]) -> tuple[list[Float[Tensor, "n n n"]], list[Float[Tensor, " s"]]]:
        """The present maps at some places of the sums, and the FSC of the halves of each, on the host."""
        maps = [self._joint_map(place).cpu() for place in places]
        return maps, [fsc(*self._halves(place)).cpu() for place in places]

    def _sums_at(self, place: int) -> Backprojection:
        """Of one map; symmetric where axes are known."""
        if self._imposed is None:
            return self._sums.of_class(place)
        own = self._sums.merged([place])
        own.symmetrise(self._imposed.others, self.radius)
        return own

    def _generator(self, start: int) -> torch.Generator:
        """Of the step alone: a run that was taken up again turns its grids alike."""
        return torch.Generator().manual_seed(1_000_003 * self._seed(start) + 2 * self._step)

    def _judge(self, batch: ParticleImages) -> None:
        """Note how much better than an empty map each mixture explains held-out particles."""
        hypotheses = math.log(2 * len(self._grid) * len(self._shifts))
        for start in self._going:
            if self._judged == 0:
                self._posteriors[start] = self._posterior(start)
            if len(batch):
                images, prior = batch.within(self.radius), self._balance.log_prior[start]
                evidence = self._posteriors[start].log_evidence(images, self._noise.pixel_weight(self._near), prior)
                self._judge_beside(images, evidence)
                gain = evidence.double().logsumexp(1) - hypotheses - prior.logsumexp(0)
                self._gains[start] += torch.stack([gain.sum(), gain.square().sum(), gain.new_tensor(len(gain))])

    def _judge_beside(self, images: ParticleImages, evidence: Float[Tensor, "b classes"]) -> None:
        """What else is asked of held-out images, whose evidence of each class is known, the class's prior included."""

    def _choose(self, world: World) -> str:
        """The start that held-out particles like best goes on alone; how it stands, in words.

        Raises:
            TrainingError: see `finish_pass`.
        """
        world.all_reduce_(self._gains)
        total, squares, count = self._gains[self._going].T
        mean = total / count
        error = ((squares / count - mean.square()).clamp_min(0) / count).sqrt()
        self._gains.zero_()
        self._posteriors.clear()
        best = int(mean.argmax())  # host sync
        self._earlier.append(float(mean[best]))
        logger.info("start: held-out log-likelihood gain per image of each random start: %s",
                    ", ".join(f"{gain:.2f}" for gain in mean.tolist()))  # fmt: skip
        told = f"held-out images gain {mean[best]:.2f} ± {error[best]:.2f} in log-likelihood over an empty map"
        self._refuse_noise(float(mean[best]), float(error[best]), told)
        self._going = [self._going[best]]
        shares = self._balance.share[self._going[0]].cpu().numpy()
        held = " ".join(f"{100 * share:.0f}" for share in shares)
        return f"{told}; classes hold {held} % (effective number {effective_classes(shares):.1f})"

    def _settled(self) -> bool:
        """Whether two more rounds brought next to nothing."""
        if len(self._earlier) >= self._most:
            return True
        rounds = self._earlier[self._since :]
        least = SETTLED_AGAIN if self._since else self.least_rounds
        return len(rounds) >= least and rounds[-1] < SETTLED * rounds[-3:][0]

    def _join_alike(self, world: World) -> bool:
        """Empty the classes whose map is another, larger class's, in whatever frame and hand. Collective."""
        start, device = self._going[0], self._grid.device
        gone = torch.zeros(self._classes, device=device)
        if world.is_leader:
            maps, halves = self._to_compare(range(start * self._classes, (start + 1) * self._classes))
            same = alike(maps, halves, self._balance.share[start].tolist(), SHELLS, ALIKE)
            gone += torch.tensor([float(other is not None) for other in same], device=device)
        world.all_reduce_(gone)
        at = gone.nonzero()[:, 0]  # host sync
        for tensor in self._sums.tensors():
            tensor[start * self._classes + at] = 0
        self._balance.give_up(start, at)
        if len(at):
            note = (
                f"{len(at)} of {self._classes} classes showed the same structure as another one and were given up: "
                "for compositions or conformations of one assembly choose train.class_mode = docked"
            )
            self._learned.notes += (note,)
            logger.warning("%s", note)
        return len(at) > 0

    def _first_references(self) -> ReferenceSet:
        """The classes' maps, the same for both halves, filtered by what the halves' own sums share. Collective."""
        start, context = self._going[0], self._context
        pixel_size = context.store.level_pixel_size(self._sums.box_size)
        joint, first = self._solved(start), start * self._classes
        check_contrast(joint[int(self._balance.share[start].argmax())], context.config.run.data)
        maps = []
        for number, volume in enumerate(joint):
            maps.append(torch.stack([volume, *self._halves(first + number)]))
            if float(volume.amax()) > 0:
                maps[-1] = self._to_centre(maps[-1], volume)
        all_maps, noise = torch.stack(maps), torch.ones(self._sums.box_size // 2 + 1, device=self._grid.device)
        shares = None
        if context.one_assembly:
            shares = tied_shares(all_maps[:, 1:], self._balance.share[start].float(), context.world)
        found = ReferenceSet.of_maps(
            all_maps[:, 1:], pixel_size, noise=noise, radius=FIRST_REFERENCE_RADIUS, solvent=context.solvent,
            shares=shares,
        )  # fmt: skip
        return replace(found, maps=all_maps[:, :1].expand(-1, 2, -1, -1, -1).clone())
