"""Classes whose labels have settled are given fresh random starts, each on its own images.

Labels can be right while the poses of a class are caught in a local optimum, and nothing in the mixture leads out of
it: its map explains its own images better than any other class does. So once classes have settled, each gets maps from
random poses, as the start of one map would, that learn from the same batches: every image counts as much as it belongs
to the class. Held-out images of the class tell whether a fresh map explains them better than the one that the class
has; only where it does so beyond the error is it taken.

Over all classes an image is compared with as many fresh maps as one class has, beside the K maps of the mixture that go
on learning. A class's fresh map goes on while it gets better, never for more rounds than the classes had to settle: in
all no more than K starts of one class with as many images.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import reference_transform
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.search import grid_evidence, templates, turned_grid
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_start import COUNTED, ClassStart
from scalecryo.train.stages.start_rounds import DECAY

logger = logging.getLogger(__name__)
FRESH = 2  # random starts of each class
BETTER = 3.0  # standard errors by which a fresh map's likelihood must be better
GROWS, LEAST_ROUNDS = 1.02, 2  # factor in likelihood gain for which a fresh map goes on, and rounds that it has
LEAST_SHARE = 0.02  # of the particles, below which a class is left as it is: it is all but empty
SEED = 1000  # of the first fresh start; the starts of the mixture have those below


class ClassRestarts(ClassStart):
    """The start of several classes, and fresh starts of each."""

    def __init__(self, context: RunContext, learned: Learned, *, classes: int = 0, starts: int = 0) -> None:
        """See `ClassStart`."""
        super().__init__(context, learned, classes=classes, starts=starts, sets=1 + FRESH)
        self._fresh: dict[int, list[int]] = {}  # places of the fresh maps of each class that still learn
        self._gained: dict[int, float] = {}  # by the best of them in the round before
        # Of the places, those whose first step is from random poses; no checkpoint lies before that step.
        self._unposed: set[int] = set()
        self._begun = 0  # the step at which they began
        self._taken, self._over = 0, False
        self._noises = self._noise_of_each()
        self._learnt: list[NoiseSpectrum] = []  # of this step
        self._fresh_banks: dict[int, Complex[Tensor, "h p"]] = {}
        self._duels = torch.zeros(len(self._gains) * self._classes, 4, dtype=torch.float64, device=context.device)
        """Of each fresh map and its held-out images: their summed weight; their gain over the present map, and its
        square; the present map's gain over an empty one."""

    def _noise_of_each(self) -> list[NoiseSpectrum]:
        """Of every place in the sums: what a fresh map does not explain yet is noise to it, as in any start."""
        device = self._context.device
        return [NoiseSpectrum(len(self._noise.power), device) for _ in range(self._sums.classes)]

    def _standing(self) -> dict[str, Any]:
        own = {"fresh": dict(self._fresh), "gained": dict(self._gained), "begun": self._begun, "taken": self._taken}
        return super()._standing() | own | {"over": self._over}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._fresh, self._gained = dict(standing["fresh"]), dict(standing["gained"])
        self._begun, self._taken, self._over = (standing[key] for key in ("begun", "taken", "over"))

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), *(tensor for noise in self._noises for tensor in noise.tensors())]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        self._learnt = self._noise_of_each() if self._fresh else []
        super()._learn(batch, world)
        self._fresh_banks.clear()  # the maps change, and so does the grid
        for own, found in zip(self._noises, self._learnt, strict=False):
            own.decay(DECAY)
            own.power += found.power
            own.count += found.count

    def _beside(self) -> Sequence[Tensor]:
        return [tensor for noise in self._learnt for tensor in noise.tensors()]

    def _insert_beside(
        self,
        images: ParticleImages,
        half: int,
        share: Float[Tensor, "b classes"],
        grid: Float[Tensor, "h 3 3"],
        fresh: Backprojection,
    ) -> None:
        for number, places in self._fresh.items():
            at = share[:, number] > COUNTED
            some = images.select(at)
            if not len(some):
                continue
            weights = self._weights(number, some, share[at, number], grid)
            for place, weight in zip(places, weights.T, strict=True):
                counted = weight > COUNTED
                own = some.select(counted)
                if len(own):
                    self._insert_fresh(own, weight[counted], place, half, grid, fresh)

    def _weights(
        self, number: int, images: ParticleImages, share: Float[Tensor, " b"], grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b places"]:
        """How much each image of a class counts for each of its fresh maps: as for the class."""
        return share[:, None].expand(-1, len(self._fresh[number]))

    def _insert_fresh(
        self,
        images: ParticleImages,
        weight: Float[Tensor, " b"],
        place: int,
        half: int,
        grid: Float[Tensor, "h 3 3"],
        fresh: Backprojection,
    ) -> None:
        """Images in a fresh map: in its first step at random poses."""
        near, learnt = self._near, self._learnt[place]
        if self._step == self._begun and place in self._unposed:
            rotation, shift = self._random_poses(len(images), SEED + 2 * place + half)
            weighted = ctf_weighted(images.transforms, images.ctf)
            fresh.insert(weighted, rotation, shift, weight, near, class_index=place, half=half)
            learnt.add(images.transforms, weight, near)
        else:
            bank, noise = self._fresh_bank(place, grid), self._noises[place]
            self._insert_of_class(images, weight, place, half, bank, grid, noise, fresh, learnt)

    def _judge_beside(self, images: ParticleImages, evidence: Float[Tensor, "b classes"]) -> None:
        if not self._fresh:
            return
        share, start = evidence.softmax(1), self._going[0]
        grid = turned_grid(self._grid, self._generator(start))
        present = evidence.double() - self._balance.log_prior[start]
        over = present - math.log(2 * len(self._grid) * len(self._shifts))
        for number, places in self._fresh.items():
            counted = share[:, number] > COUNTED
            own, part = images.select(counted), share[counted, number].double()
            if not len(own):
                continue
            for place, found in zip(places, self._fresh_evidence(number, own, grid).T, strict=False):
                gain = found - present[counted, number]
                self._duels[place] += torch.stack(
                    [
                        part.sum(),
                        (part * gain).sum(),
                        (part * gain.square()).sum(),
                        (part * over[counted, number]).sum(),
                    ]
                )

    def _fresh_evidence(
        self, number: int, images: ParticleImages, grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b judged"]:
        """Of images for the fresh maps of a class, up to each image's constant: of each by itself."""
        weight, found = self._noise.pixel_weight(self._near), []
        for place in self._fresh[number]:
            bank = self._fresh_bank(place, grid)
            each = grid_evidence(images.transforms, images.ctf, weight, bank, self._shifts, self._near)
            found.append(each.double())
        return torch.stack(found, 1)

    def _fresh_bank(self, place: int, grid: Float[Tensor, "h 3 3"]) -> Complex[Tensor, "h p"]:
        """Slices of a fresh map as it stands, from both halves."""
        if place not in self._fresh_banks:
            transform = reference_transform(self._joint_map(place), self._sums.scale)
            self._fresh_banks[place] = templates(transform, grid, self._near, self._sums.scale)
        return self._fresh_banks[place]

    def _ends(self, world: World) -> bool:
        if self._fresh:
            return self._compare(world)
        if not super()._ends(world):
            return False
        if len(self._earlier) < self._most:
            self._begin_next()
        return not self._fresh

    def _begin_next(self) -> None:
        """What follows once classes have settled, if anything."""
        if not self._over:
            self._begin_fresh()

    def _held(self) -> list[int]:
        """Classes that hold particles."""
        share = self._balance.share[self._going[0]].tolist()  # host sync
        return [number for number in range(self._classes) if share[number] >= LEAST_SHARE]

    def _begin_fresh(self) -> None:
        """Fresh maps of every class that holds particles, from the next step on."""
        going = self._going[0]
        others = [number for number in range(len(self._gains)) if number != going][:FRESH]
        self._fresh = {number: [other * self._classes + number for other in others] for number in self._held()}
        self._unposed = {place for places in self._fresh.values() for place in places}
        for place in self._unposed:
            self._noises[place] = NoiseSpectrum(len(self._noise.power), self._context.device)
            for tensor in self._sums.tensors():
                tensor[place] = 0
        self._gained = dict.fromkeys(self._fresh, 0.0)
        self._begun, self._since = self._step, len(self._earlier)

    def _compare(self, world: World) -> bool:
        """After a round of fresh maps: whether any is to be taken, or to go on; the end where none is. Collective."""
        duels, told = self._judged_duels(world), []
        for number, places in list(self._fresh.items()):
            best = max(places, key=lambda place: duels[place].mean)
            duel = duels[best]
            grows = self._grows(number, duel)
            self._fresh[number] = [best]
            told.append(f"class {number + 1}: {duel}{', taken' if duel.better else ''}")
            if duel.better:
                self._put(best, self._going[0] * self._classes + number)
                self._taken += 1
            if duel.better or not grows:
                del self._fresh[number]
        logger.info("start: held-out log-likelihood of images in a fresh map of their class over its present one: %s",
                    "; ".join(told))  # fmt: skip
        if self._fresh:
            return False
        self._over, self._since = True, len(self._earlier)
        return not self._taken

    def _grows(self, number: int, duel: "Duel") -> bool:
        """Whether what a class's fresh maps gain still grows, so that they are to go on."""
        rounds = len(self._earlier)
        young, last = rounds < self._since + LEAST_ROUNDS, rounds >= min(2 * self._since, self._most)
        grown = duel.gained > GROWS * self._gained[number]
        self._gained[number] = duel.gained
        return not last and (young or grown)

    def _judged_duels(self, world: World) -> "list[Duel]":
        """What held-out images say of the map at each place. Collective."""
        world.all_reduce_(self._duels)
        count, total, squares, present = self._duels.T
        count = count.clamp_min(1e-12)
        mean = total / count
        error = ((squares / count - mean.square()).clamp_min(0) / count).sqrt()
        each = torch.stack([mean, error, mean + present / count, total], 1).tolist()  # host sync
        self._duels.zero_()
        self._fresh_banks.clear()
        return [Duel(*values) for values in each]

    def _put(self, source: int, place: int) -> None:
        """A fresh map's sums in another place."""
        for tensor in self._sums.tensors():
            tensor[place] = tensor[source]


class Duel(NamedTuple):
    """What held-out images of a class say of a fresh map, or of a pair.

    Attributes:
        mean: gain in log-likelihood over the class's present map.
        error: of it.
        gained: gain over an empty map.
        total: `mean`, summed over the images.
    """

    mean: float
    error: float
    gained: float
    total: float

    @property
    def better(self) -> bool:
        """Whether beyond the error."""
        return self.mean > BETTER * self.error

    def __str__(self) -> str:
        """For the log."""
        return f"{self.mean:+.2f} ± {self.error:.2f}"
