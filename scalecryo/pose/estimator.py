"""The E-step, once: poses of a batch against the references of each particle's own half.

A particle's candidates (the remembered pose, separated modes of a search or of the encoder) are locally refined at
rising radii; the likeliest is its pose. Every stage that poses particles calls this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalecryo.distributed.timer import Timer
from scalecryo.map.reference import Reference, References
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.grouping import rows_by_group
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, PoseEstimates
from scalecryo.pose.candidate_refinement import PRUNE_FRACTION, empty_cost, refine_candidates, refined_modes
from scalecryo.pose.candidate_sources import CandidateSource
from scalecryo.pose.particle_probability import ParticleProbability, pose_gain, predicted_images

LEAST_WEIGHT = 0.05  # in the maps, of an image that does not seem to show the particle
SURE = 1 - 1e-4  # probability of a class beyond which the others are not looked at again


@dataclass(frozen=True)
class EStepPlan:
    """What the E-step does with a batch.

    Attributes:
        radius: Fourier pixels of the last local refinement.
        passes: Levenberg-Marquardt passes of every particle at that radius; 0: none after the candidates' own.
        search_known: whether candidates are sought also for particles with a remembered pose.
        steps: radius and passes of the candidates' refinement, before one is chosen.
        prune_fraction: see `PRUNE_FRACTION`.
        fit_shift: False leaves shifts as they are.
        probability_radius: Fourier pixels that tell whether an image shows a particle; 0: every image does.
        shift_radius: of the disc of possible shifts, Å.
        equivalent: rotations of each class that nothing tells apart: related poses are no rivals; empty: none.
        class_radius: Fourier pixels at most by which a class is chosen, where an image has its share in a map.
        labels_stay: whether a known class, and its probability, are kept.
        modes: poses of each particle that `estimate_modes` tells.
        shift_sigma: of the Gaussian prior of shifts that it goes by, Å; None: all are equally likely.
        doubted: confidence, times the probability of showing a particle, below which a known pose is one candidate
            beside those of a search; in the only class.
    """

    radius: float
    passes: int
    search_known: bool
    steps: tuple[tuple[float, int], ...]
    prune_fraction: float = PRUNE_FRACTION
    fit_shift: bool = True
    probability_radius: float = 0.0
    shift_radius: float = 0.0
    equivalent: Sequence[Float[Tensor, "_ 3 3"]] = ()
    class_radius: float = 24.0
    labels_stay: bool = False
    modes: int = 1
    shift_sigma: float | None = None
    doubted: float = 0.0


class PoseEstimator:
    """Poses of batches against references that stand still."""

    def __init__(self, references: References, plan: EStepPlan, source: CandidateSource, timer: Timer) -> None:
        """
        Args:
            references: by class and half, at the level of the images.
            plan: what to do.
            source: of candidates for particles that are searched.
            timer: counts search and local refinement.
        """
        self._references, self._plan, self._source, self._timer = references, plan, source, timer
        self._classes = 1 + max(number for number, _ in references)
        self._judges: dict[int, ParticleProbability] = {}  # by reference, which outlives this

    def estimate(
        self, images: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"], *, all_classes: bool = False
    ) -> PoseEstimates:
        """The likeliest pose of every particle, over all classes.

        Args:
            images: a batch.
            known: what is remembered of them.
            seen: of which of them anything is.
            all_classes: whether to look at the other classes of those too that are sure of theirs.
        """
        found = PoseEstimates.unknown(len(images), images.transforms.device)
        for half in (1, 2):
            at = images.rows_by_half[half - 1]
            if len(at):
                own = images.select(at), known.select(at), seen[at]
                if self._classes == 1:
                    found = found.put(at, self._estimate(*own, (0, half)))
                else:
                    found = found.put(at, self._over_classes(*own, half, all_classes))
        return found

    def estimate_modes(
        self, images: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"]
    ) -> list[PoseEstimates]:
        """The likeliest pose of every particle, then the next ones, `modes` in all; each is sought, in the only class.

        The confidence of each but the first is its share of the probability, 0 where there is none.
        """
        plan = self._plan
        found = [PoseEstimates.unknown(len(images), images.transforms.device)] * plan.modes
        for half in (1, 2):
            at = images.rows_by_half[half - 1]
            if not len(at):
                continue
            own, reference = images.select(at), self._references[0, half]
            candidates = self._candidates(own, known.select(at), seen[at], reference)
            with self._timer.part("local_refinement"):
                modes = refined_modes(
                    own, candidates, reference, plan.steps, plan.modes, fit_shift=plan.fit_shift,
                    prune_fraction=plan.prune_fraction, equivalent=self._equivalent(0), shift_sigma=plan.shift_sigma,
                )  # fmt: skip
            modes[0] = self._told(own, modes[0], (0, half))
            found = [whole.put(at, mode) for whole, mode in zip(found, modes, strict=True)]
        return found

    def _over_classes(
        self, images: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"], half: int, all_classes: bool
    ) -> PoseEstimates:
        """The likeliest pose over all classes. A class that all but excludes the others is the only one looked at.

        Classes need not share a frame: a known pose is one in its own class, and the others are searched.
        """
        plan, device = self._plan, images.transforms.device
        sure = seen & ((known.class_probability > SURE) | plan.labels_stay) & (not all_classes)
        radius = plan.radius if plan.search_known else min(plan.radius, plan.class_radius)
        score = torch.full((len(images), self._classes), -torch.inf, dtype=torch.float64, device=device)
        each = torch.arange(self._classes, device=device)[:, None]
        own = seen & (known.class_index == each)
        groups = torch.where(own, 2 * each, torch.where(sure, 2 * self._classes, 2 * each + 1))
        places = rows_by_group(groups.flatten(), 2 * self._classes)
        by_class = []
        for number in range(self._classes):
            reference = self._references[number, half]
            found = PoseEstimates.unknown(len(images), device)
            for at, here in ((places[2 * number], True), (places[2 * number + 1], False)):
                if len(at):
                    rows = at - number * len(images)
                    some, poses = images.select(rows), known.select(rows)
                    # Of another class: as one never seen, but at the known shift, and its pose is a candidate.
                    estimate = self._estimate(some, poses, seen[rows], (number, half), search=not here)
                    found = found.put(rows, estimate)
                    score[rows, number] = pose_gain(some, estimate, reference, radius)
            by_class.append(found)
        best = _best_class(by_class, score)
        if not plan.labels_stay:
            return best
        share = torch.where(seen, known.class_probability, best.class_probability)
        return replace(best, class_probability=share, confidence=best.confidence * torch.where(seen, share, 1.0))

    def _estimate(
        self,
        images: ParticleImages,
        known: PoseEstimates,
        seen: Bool[Tensor, " b"],
        which: tuple[int, int],
        *,
        search: bool | None = None,
    ) -> PoseEstimates:
        """Poses against a class's half: all searched, or none, or those (None) without a remembered pose to rely on."""
        plan, found, reference = self._plan, known, self._references[which]
        if search or plan.search_known:
            found = self._search(images, known, seen, which)
        elif search is None:
            doubted = known.confidence * known.particle_probability < plan.doubted
            wanted = (seen.logical_not() | doubted).nonzero()[:, 0]  # host sync
            if len(wanted):
                found = known.put(
                    wanted, self._search(images.select(wanted), known.select(wanted), seen[wanted], which)
                )
        if plan.passes:
            start = PoseCandidates(found.rotation[:, None], found.shift[:, None], found.confidence[:, None] * 0)
            with self._timer.part("local_refinement"):
                refined = refine_candidates(
                    images, start, reference, [(plan.radius, plan.passes)], fit_shift=plan.fit_shift
                )
            found = replace(refined, confidence=found.confidence)
        return self._told(images, found, which)

    def _equivalent(self, number: int) -> Float[Tensor, "e 3 3"] | None:
        """Rotations of a class that nothing tells apart."""
        return self._plan.equivalent[number] if self._plan.equivalent else None

    def _told(self, images: ParticleImages, found: PoseEstimates, which: tuple[int, int]) -> PoseEstimates:
        """Whether the images show the particle at these poses, by the other half's map, which holds nothing of them.

        Where a view is rare, an image has a large share in its own half's map, which speaks for any that is there.
        """
        plan = self._plan
        if not plan.probability_radius:
            return found
        reference = self._references[which[0], 3 - which[1]]
        judge = self._judges.get(id(reference))
        if judge is None:
            pixels, shift_radius = images.pixels.prefix(plan.probability_radius), plan.shift_radius
            judge = ParticleProbability(reference, pixels, shift_radius if plan.fit_shift else 0.0)
            self._judges[id(reference)] = judge
        return replace(found, particle_probability=judge.of(images, found))

    def _candidates(
        self, images: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"], reference: Reference
    ) -> PoseCandidates:
        with self._timer.part("search"):
            return self._source.candidates(images, reference, known, seen)

    def _search(
        self, images: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"], which: tuple[int, int]
    ) -> PoseEstimates:
        plan, reference = self._plan, self._references[which]
        candidates = self._candidates(images, known, seen, reference)
        with self._timer.part("local_refinement"):
            return refine_candidates(
                images,
                candidates,
                reference,
                plan.steps,
                fit_shift=plan.fit_shift,
                prune_fraction=plan.prune_fraction,
                equivalent=self._equivalent(which[0]),
            )

    def predictions(
        self, images: ParticleImages, found: PoseEstimates, count: int, half: int
    ) -> tuple[ParticleImages, Tensor]:
        """The first so many particles of a half, and what their references predict for them at the poses found."""
        at = images.rows_by_half[half - 1][:count]
        few, poses = images.select(at), found.select(at)
        predicted = torch.zeros_like(few.transforms)
        everyone = torch.arange(len(at), device=at.device)
        classes = rows_by_group(poses.class_index, self._classes) if self._classes > 1 else (everyone,)
        for number, own in enumerate(classes):
            if len(own):
                predicted[own] = predicted_images(few.select(own), poses.select(own), self._references[number, half])
        return few, predicted

    def pixel_weight(self, pixels: FourierPixels) -> Float[Tensor, " p"]:
        """Hermitian weight of Fourier pixels over the noise that all references share."""
        return self._references[0, 1].noise.pixel_weight(pixels)

    def likelihood_gain(self, images: ParticleImages, found: PoseEstimates) -> Float[Tensor, " b"]:
        """Log-likelihood ratio of the poses found over an empty map, at the radius of the last refinement."""
        near = images.within(self._plan.radius)
        weight = self.pixel_weight(near.pixels)
        return empty_cost(near.transforms, weight) + found.log_likelihood

    def known_gain(self, images: ParticleImages, known: PoseEstimates) -> Float[Tensor, " b"]:
        """The same of known poses, in the only class."""
        gain = torch.zeros(len(images), dtype=torch.float64, device=images.transforms.device)
        for half in (1, 2):
            at = images.rows_by_half[half - 1]
            if len(at):
                own, poses = images.select(at), known.select(at)
                gain[at] = pose_gain(own, poses, self._references[0, half], self._plan.radius)
        return gain


def _best_class(by_class: Sequence[PoseEstimates], score: Float[Tensor, "b classes"]) -> PoseEstimates:
    """Of every particle the estimate in its likeliest class; its confidence shrinks by the other classes' share."""
    share, best = score.softmax(1).max(1)
    row = torch.arange(len(best), device=best.device)
    columns = {
        column.name: torch.stack([getattr(found, column.name) for found in by_class])[best, row]
        for column in fields(by_class[0])
    }
    chosen = PoseEstimates(**columns | {"class_index": best})
    share = share.float()
    return replace(chosen, class_probability=share, confidence=chosen.confidence * share)


def map_weight(found: PoseEstimates) -> Float[Tensor, " b"]:
    """Of each image in the maps: one that does not seem to show the particle hardly enters them."""
    return found.particle_probability.clamp_min(LEAST_WEIGHT)
