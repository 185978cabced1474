"""Classes of one assembly, told apart at the poses of its one common map (`class_mode = docked`, imported poses).

Expectation maximisation over the class alone: every particle stays at its pose, and its posterior over K maps says how
much of it enters each. It begins with random labels, several times over. A particle is compared with maps of the other
three parts of the particles: its own noise in a map would hold it there. So the likelihood is that of data never seen,
and tells which labels led furthest. First at low frequencies, where few unknowns face many images, then as far as the
common map is resolved.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.data.selection.partition import PARTS
from scalecryo.distributed.world import World
from scalecryo.map.backprojection import PADDING, Backprojection
from scalecryo.map.reference import Reference, ReferenceSet, reference_transform
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.fsc import weight_shells
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.mask import density_radius, mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.pose.candidate_refinement import empty_cost
from scalecryo.pose.estimator import map_weight
from scalecryo.pose.particle_probability import ParticleProbability, predicted_images
from scalecryo.runs.monitor import PassReport
from scalecryo.train.owned_sums import OwnedSums, tied_shares
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_shares import floored
from scalecryo.train.stages.schedule import PROBABILITY_RADIUS

logger = logging.getLogger(__name__)
STARTS = 3  # random labels that are tried
RADII = (12.0, 24.0)  # Fourier pixels: of the first passes, and at most of the last ones
MOST_PASSES, LEAST_PASSES = (30, 8), (8, 3)  # at each radius
SETTLED, OVER = 2e-3, 3  # gain in log-likelihood per image and pass that is progress, over so many passes
BATCH, MOST_PARTICLES = 1024, 20_000
SIGNAL = 0.143
REGULARISATION = 0.05
LABELLED = 1 - 1e-6  # most probability of a label: 1 is that of a particle that was given none
Labelling = tuple[int, int, int]  # start, class, part that is left out


class Classification:
    """Passes at a low radius from several random labels, then at a higher one with the best; the last one labels."""

    name = "classes"
    starts = STARTS
    radii: tuple[float, ...] = RADII
    most_passes: tuple[int, ...] = MOST_PASSES
    least_passes: tuple[int, ...] = LEAST_PASSES

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: the common map, and a pose of every particle; gets the maps of the classes and the labels.
        """
        self._context, self._learned = context, learned
        self._classes = context.config.train.classes
        self._going = list(range(self.starts))
        self._share = torch.full((self.starts, self._classes), 1 / self._classes, device=context.device)
        self._maps: dict[Labelling, Float[Tensor, "n n n"]] = {}
        self._references: dict[Labelling, Reference] = {}
        self._judges: dict[tuple[int, int], ParticleProbability] = {}  # of a class's maps, in the last pass
        self._gains: list[float] = []  # in log-likelihood over an empty map, of the best labels, at this radius
        self._at_radius, self._pass, self._images = 0, 0, 0
        self._last = False

    def request(self) -> BatchRequest:
        """The same particles in every pass."""
        context, common, radius = self._context, self._common, self._radius()
        fits = [level for level in context.levels if level / 2 - 1 >= radius]
        level = min(fits) if fits else max(context.levels)
        self._pixels = context.pixels(level, min(radius, level / 2 - 1))
        noise = common.level_noise(level, self._pixels)
        self._pixel_weight = noise.pixel_weight(self._pixels)
        for which, volume in self._maps.items():
            resized = volume if volume.shape[-1] == level else fourier_resize_3d(volume, level)
            diameter = min(2 * density_radius(resized) / level, 1.0)
            self._references[which] = Reference(reference_transform(resized, PADDING), PADDING, noise, diameter)
        sums = len(self._going) * self._classes * PARTS
        self._sums = Backprojection(level, device=context.device, classes=sums)
        self._counts = torch.zeros(len(self._going), self._classes, dtype=torch.float64, device=context.device)
        self._gain = torch.zeros(len(self._going), 2, dtype=torch.float64, device=context.device)
        """Of each start: summed log-likelihood gain, of how many images."""
        self._images = 0
        self._pass += 1
        if self._last:
            self._learned.particles.begin(self._pass_name())
        epoch = context.order(level, BATCH).steps_per_epoch
        return BatchRequest((self._pixels,), BATCH, start=0, batches=self._batches(epoch))

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """Share a batch out among the classes, and add it to their sums."""
        (batch,) = images
        groups = self._learned.groups
        if groups is not None:
            batch = groups.corrected(batch)
        known, seen = self._learned.particles.read(batch.rows)
        batch, known = batch.select(seen), known.select(seen)
        if not len(batch):
            return
        known = self._in_common_frame(known, batch)
        self._images += len(batch)
        part = self._context.partition.part(batch.rows)
        weighted, shift_px = ctf_weighted(batch.transforms, batch.ctf), known.shift_px(batch.pixel_size)
        fits = map_weight(known)
        for place in range(len(self._going)):
            share = self._shares(batch, known, part, place)
            self._counts[place] += share.sum(0)
            for number in range(self._classes):
                weight = (fits * share[:, number]).float()
                index = (place * self._classes + number) * PARTS + part
                self._sums.add(weighted, known.rotation, shift_px, weight, batch.half, self._pixels, index)
            if self._last:
                labelled = self._labelled(batch, known, part, share)
                self._learned.particles.note(batch.rows, self._in_class_frame(labelled, batch), batch.half)

    def finish_pass(self, world: World) -> PassReport:
        """Solve the maps; choose among the labels and go on to the next radius when nothing gets better. Collective."""
        # Both halves' sums of a class on one worker: its maps in passes but the last are made of both.
        owned = OwnedSums(self._sums, world, parts=PARTS, joined=True)
        owned.reduce_(self._pixels.radius_limit)
        if self._context.point_group is not None:
            owned.symmetrise(self._context.point_group.others, self._pixels.radius_limit)
        world.all_reduce_(self._counts, self._gain)
        self._share[self._going] = floored(self._counts).float()
        report = f"{self.name}: pass {self._pass}"
        if self._last:
            self._end(owned, world)
            return PassReport(f"{report}, {self._told()}", self._images, checkpoint=False)
        self._solve(owned)
        if self._pass > 1:  # the first one only spread random labels
            gain = (self._gain[:, 0] / self._gain[:, 1]).tolist()  # host sync
            self._gains.append(max(gain))
            report += f", held-out log-likelihood gain per image {max(gain):.2f}, {self._told()}"
            stalled = len(self._gains) >= self.least_passes[self._at_radius]
            stalled = stalled and self._gains[-1] - self._gains[-OVER] < (OVER - 1) * SETTLED
            if stalled or len(self._gains) == self.most_passes[self._at_radius]:
                self._go_on(gain.index(max(gain)))
        return PassReport(report, self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether there are maps of the classes."""
        return self._common.classes == self._classes

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it takes less time than an iteration, and is made anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def _radius(self) -> float:
        """Fourier pixels of the next pass."""
        return min(self.radii[self._at_radius], max(self._common.resolution(SIGNAL)[0], self.radii[0]))

    def _batches(self, epoch: int) -> int:
        """How many the next pass reads."""
        return min(epoch, -(-MOST_PARTICLES // BATCH))

    def _pass_name(self) -> str:
        """Of the pass that labels."""
        return f"classes_{self._learned.steps:04d}"

    def _in_common_frame(self, known: PoseEstimates, batch: ParticleImages) -> PoseEstimates:
        """Poses as a map of all classes has them: as they are."""
        return known

    def _in_class_frame(self, found: PoseEstimates, batch: ParticleImages) -> PoseEstimates:
        """Poses as the maps of the classes found have them."""
        return found

    def _labelled(
        self, batch: ParticleImages, known: PoseEstimates, part: Int[Tensor, " b"], share: Float[Tensor, "b classes"]
    ) -> PoseEstimates:
        """The likeliest class of each image, and whether it shows that class: one unlike the common map is no junk."""
        probability, best = share.max(1)
        fits = known.particle_probability.clone()
        for (_, number, own), reference in self._references.items():
            at = ((best == number) & (part == own)).nonzero()[:, 0]  # host sync
            if len(at):
                if (number, own) not in self._judges:
                    pixels = self._pixels.prefix(min(self._pixels.radius_limit, PROBABILITY_RADIUS))
                    shift_radius = self._context.shift_radius if self._context.fit_shift else 0.0
                    self._judges[number, own] = ParticleProbability(reference, pixels, shift_radius)
                fits[at] = self._judges[number, own].of(batch.select(at), known.select(at))
        return replace(
            known, class_index=best, class_probability=probability.float().clamp_max(LABELLED),
            particle_probability=fits,
        )  # fmt: skip

    def _first_shares(self, batch: ParticleImages, known: PoseEstimates, start: int) -> Float[Tensor, "b classes"]:
        """At random, by a start."""
        label = self._context.partition.label(batch.rows, start, self._classes)
        return torch.nn.functional.one_hot(label, self._classes).double()

    @property
    def _common(self) -> ReferenceSet:
        assert self._learned.references is not None, "a common map comes first"
        return self._learned.references

    def _shares(
        self, batch: ParticleImages, known: PoseEstimates, part: Int[Tensor, " b"], place: int
    ) -> Float[Tensor, "b classes"]:
        """Posterior of each image over the classes, from one start."""
        start = self._going[place]
        if not self._references:
            return self._first_shares(batch, known, start)
        cost = torch.zeros(len(batch), self._classes, dtype=torch.float64, device=batch.rows.device)
        for own in range(PARTS):
            at = (part == own).nonzero()[:, 0]  # host sync
            if len(at):
                some, poses = batch.select(at), known.select(at)
                each = [self._cost(some, poses, self._references[start, k, own]) for k in range(self._classes)]
                cost[at] = torch.stack(each, 1)
        logits = self._share[start].double().log() - cost
        gain = logits.logsumexp(1) + empty_cost(batch.transforms, self._pixel_weight)
        self._gain[place] += torch.stack([gain.sum(), gain.new_tensor(float(len(batch)))])
        return logits.softmax(1)

    def _cost(self, images: ParticleImages, poses: PoseEstimates, reference: Reference) -> Float[Tensor, " b"]:
        return empty_cost(images.transforms - predicted_images(images, poses, reference), self._pixel_weight)

    def _solve(self, owned: OwnedSums) -> None:
        """Maps of every start and class without each part: of both halves, within the common map's density."""
        self._maps, self._references = {}, {}
        density = torch.stack([self._common.mean(number) for number in range(self._common.classes)]).amax(0)
        mask = mask_from_map(fourier_resize_3d(density, self._sums.box_size), 1.0)
        for own in range(PARTS):
            for start, maps in zip(self._going, self._solved_without(own, owned, mask), strict=True):
                for number, solved in enumerate(maps):
                    self._maps[start, number, own] = solved * mask

    def _solved_without(
        self, own: int, owned: OwnedSums, mask: Float[Tensor, "n n n"]
    ) -> Float[Tensor, "starts classes n n n"]:
        """Maps of the particles of the other parts, filtered by what the halves of the common map share. Collective."""
        halves, _ = owned.solve_tied(self._share[self._going], REGULARISATION, without=own)
        solved = halves.mean(1).unflatten(0, (-1, self._classes))
        curve = self._common.curve()[: solved.shape[-1] // 2].clamp(0, 1)
        return torch.stack([torch.stack([weight_shells(volume, curve) for volume in maps]) for maps in solved])

    def _go_on(self, best: int) -> None:
        """The best labels go on, alone; at the next radius, or to the last pass."""
        start = self._going[best]
        self._going = [start]
        self._maps = {which: volume for which, volume in self._maps.items() if which[0] == start}
        self._references, self._gains = {}, []
        self._at_radius += 1
        reach = self._common.resolution(SIGNAL)[0]
        further = self._at_radius < len(self.radii) and reach > self.radii[self._at_radius - 1] + 2
        if not further:
            self._at_radius, self._last = self._at_radius - 1, True

    def _end(self, owned: OwnedSums, world: World) -> None:
        """Half-maps of every class, and the labels."""
        common, maps, joint = self._common, owned.solve(), owned.solve_joined()
        # What a class is, both halves begin with: apart they could lay an unfinished one into different frames.
        low = (torch.arange(maps.shape[-1] // 2 + 1, device=maps.device) <= RADII[0]).float()
        for own, both in zip(maps, joint, strict=True):
            for half in own:
                half += weight_shells(both - half, low)
        pixel_size = self._context.store.level_pixel_size(self._sums.box_size)
        found = ReferenceSet.of_maps(
            maps, pixel_size, noise=common.noise, radius=self._pixels.radius_limit, solvent=self._context.solvent,
            shares=tied_shares(maps, self._share[self._going[0]], world),
        )  # fmt: skip
        self._learned.references = found
        self._learned.class_shares = tuple(self._share[self._going[0]].tolist())  # host sync
        self._learned.particles.commit(world)

    def _told(self) -> str:
        share = self._share[self._going[0]].tolist()
        return "shares " + ", ".join(f"{100 * value:.0f} %" for value in share)
