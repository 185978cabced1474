"""Classes whose labels have settled are split where others are empty, then given fresh random starts of their own.

Two structures may share a class for good while another class, whose images they took, is empty: nothing in the mixture
parts them. So where a class is empty, each of the others gets a pair of maps that compete for its images: its own, and
one from random poses, which for some rounds gets half of the images, those that the other explains least well. Held-out
images of the class tell whether the pair explains them better than its one map does; where it does so beyond the error,
the empty class takes the second.

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
from scalecryo.evaluate.likeness import alike
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import reference_transform
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.search import grid_posterior, templates, turned_grid
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_shares import Balance
from scalecryo.train.stages.class_start import ALIKE, COUNTED, SHELLS, ClassStart
from scalecryo.train.stages.start_rounds import DECAY

logger = logging.getLogger(__name__)
FRESH = 2  # random starts of each class
BETTER = 3.0  # standard errors by which a fresh map's likelihood must be better
GROWS, LEAST_ROUNDS = 1.02, 2  # factor in likelihood gain for which a fresh map goes on, and rounds that it has
LEAST_SHARE = 0.02  # of the particles, below which a class is left as it is: it is all but empty
MOST_SPLITS = 2  # times that pairs are tried: what is parted may be joined again
EVEN_ROUNDS = 2  # in which both maps of a pair get the same share of the class's images
SEED = 1000  # of the first fresh start; the starts of the mixture have those below


class ClassRestarts(ClassStart):
    """The start of several classes, and fresh starts of each."""

    def __init__(self, context: RunContext, learned: Learned, *, classes: int = 0, starts: int = 0) -> None:
        """See `ClassStart`."""
        super().__init__(context, learned, classes=classes, starts=starts, sets=1 + FRESH)
        self._fresh: dict[int, list[int]] = {}  # places of the fresh maps of each class that still learn
        self._gained: dict[int, float] = {}  # by the best of them in the round before
        self._begun = 0  # the step at which they began
        self._taken, self._over = 0, False
        self._paired = False  # whether the fresh maps of a class compete for its images
        self._splits = 0  # times that pairs were tried; `MOST_SPLITS` where they brought nothing
        self._pairs = Balance(self._classes, FRESH, context.device)  # of each class
        self._pair_mass = torch.zeros_like(self._pairs.mass)  # of this step
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
        return super()._standing() | own | {"over": self._over, "paired": self._paired, "splits": self._splits}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._fresh, self._gained = dict(standing["fresh"]), dict(standing["gained"])
        self._begun, self._taken, self._over = (standing[key] for key in ("begun", "taken", "over"))
        self._paired, self._splits = standing["paired"], standing["splits"]

    def _tensors(self) -> list[Tensor]:
        noises = (tensor for noise in self._noises for tensor in noise.tensors())
        return [*super()._tensors(), *noises, *self._pairs.tensors()]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        self._learnt = self._noise_of_each() if self._fresh else []
        self._pair_mass.zero_()
        super()._learn(batch, world)
        if self._fresh and self._paired:
            self._pairs.add(self._pair_mass, DECAY, even=len(self._earlier) < self._since + EVEN_ROUNDS)
        self._fresh_banks.clear()  # the maps change, and so does the grid
        for own, found in zip(self._noises, self._learnt, strict=False):
            own.decay(DECAY)
            own.power += found.power
            own.count += found.count

    def _beside(self) -> Sequence[Tensor]:
        return [self._pair_mass, *(tensor for noise in self._learnt for tensor in noise.tensors())]

    def _insert_beside(
        self,
        images: ParticleImages,
        half: int,
        share: Float[Tensor, "b classes"],
        grid: Float[Tensor, "h 3 3"],
        fresh: Backprojection,
    ) -> None:
        near = self._near
        for number, places in self._fresh.items():
            at = share[:, number] > COUNTED
            if not bool(at.any()):  # host sync
                continue
            some, of_place = images.select(at), self._weights(number, images.select(at), share[at, number], grid)
            for place, weights in zip(places, of_place.T, strict=True):
                counted = weights > COUNTED
                own, weight, learnt = some.select(counted), weights[counted], self._learnt[place]
                if not len(own):
                    continue
                if self._step == self._begun and not (self._paired and place == places[0]):
                    rotation, shift = self._random_poses(len(own), SEED + 2 * place + half)
                    weighted = ctf_weighted(own.transforms, own.ctf)
                    fresh.insert(weighted, rotation, shift, weight, near, class_index=place, half=half)
                    learnt.add(own.transforms, weight, near)
                    continue
                bank, noise = self._fresh_bank(place, grid), self._noises[place]
                self._insert_of_class(own, weight, place, half, bank, grid, noise, fresh, learnt)

    def _weights(
        self, number: int, images: ParticleImages, share: Float[Tensor, " b"], grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b places"]:
        """How much each image of a class counts for each of its fresh maps: wholly, or as a pair shares them."""
        places = self._fresh[number]
        if not self._paired:
            return share[:, None].expand(-1, len(places))
        if self._step == self._begun:  # in turn
            part = torch.arange(len(images), device=share.device)[:, None] % len(places)
            weights = share[:, None] * (part == torch.arange(len(places), device=share.device))
        else:
            evidence = [self._fresh_evidence(place, images, grid) for place in places]
            weights = share[:, None] * (torch.stack(evidence, 1) + self._pairs.log_prior[number].float()).softmax(1)
        self._pair_mass[number] += weights.sum(0)
        return weights

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
            each = [self._fresh_evidence(place, own, grid).double() for place in places]
            if self._paired:  # judged as one
                each = [(torch.stack(each, 1) + self._pairs.log_prior[number].log_softmax(0)).logsumexp(1)]
            for place, evidence_of_place in zip(places, each, strict=False):
                gain = evidence_of_place - present[counted, number]
                self._duels[place] += torch.stack(
                    [
                        part.sum(),
                        (part * gain).sum(),
                        (part * gain.square()).sum(),
                        (part * over[counted, number]).sum(),
                    ]
                )

    def _fresh_evidence(self, place: int, images: ParticleImages, grid: Float[Tensor, "h 3 3"]) -> Float[Tensor, " b"]:
        """Of images for a fresh map, up to each image's constant: by the noise that all maps share, to be compared."""
        bank, weight = self._fresh_bank(place, grid), self._noise.pixel_weight(self._near)
        found = grid_posterior(images.transforms, images.ctf, weight, bank, self._shifts, self._near, keep=1)
        return found.log_evidence

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
        if len(self._earlier) >= self._most:
            return True
        if self._splits < MOST_SPLITS and self._empty():
            self._begin_fresh(paired=True)
        elif not self._over:
            self._begin_fresh(paired=False)
        return not self._fresh

    def _empty(self) -> list[int]:
        """Classes that hold next to nothing."""
        share = self._balance.share[self._going[0]].tolist()  # host sync
        return [number for number in range(self._classes) if share[number] < LEAST_SHARE]

    def _begin_fresh(self, *, paired: bool) -> None:
        """Fresh maps of every class that holds particles, from the next step on."""
        going, empty = self._going[0], self._empty()
        others = [number for number in range(len(self._gains)) if number != going][:FRESH]
        held = [number for number in range(self._classes) if number not in empty]
        self._fresh = {number: [other * self._classes + number for other in others] for number in held}
        for number, places in self._fresh.items():
            for place in places:
                self._noises[place] = NoiseSpectrum(len(self._noise.power), self._context.device)
                for tensor in self._sums.tensors():
                    tensor[place] = 0
            if paired:
                self._put(going * self._classes + number, places[0])
                for own, common in zip(self._noises[places[0]].tensors(), self._noise.tensors(), strict=True):
                    own.copy_(common)
        for tensor in self._pairs.tensors():
            tensor.zero_()
        self._gained = dict.fromkeys(held, 0.0)
        self._begun, self._since, self._paired = self._step, len(self._earlier), paired

    def _compare(self, world: World) -> bool:
        """After a round of fresh maps: whether any is to be taken, or to go on; the end where none is. Collective."""
        duels, rounds = self._judged_duels(world), len(self._earlier)
        young, last = rounds < self._since + LEAST_ROUNDS, rounds >= min(2 * self._since, self._most)
        told, growing = [], False
        for number, places in list(self._fresh.items()):
            best = places[0] if self._paired else max(places, key=lambda place: duels[place].mean)
            duel = duels[best]
            grown = not last and (young or duel.gained > GROWS * self._gained[number])
            self._fresh[number], self._gained[number] = (places if self._paired else [best]), duel.gained
            told.append(f"class {number + 1}: {duel.mean:+.2f} ± {duel.error:.2f}{', better' if duel.better else ''}")
            if self._paired:  # those that are better are compared when none grows any more
                over = not grown and not duel.better
            else:
                over = duel.better or not grown
                if duel.better:
                    self._put(best, self._going[0] * self._classes + number)
                    self._taken += 1
            if over:
                del self._fresh[number]
            growing = growing or (grown and not over)
        logger.info("start: held-out log-likelihood of images in %s of their class over its present one: %s",
                    "two maps" if self._paired else "a fresh map", "; ".join(told))  # fmt: skip
        if growing:
            return False
        if self._paired:
            self._split({number: duels[places[0]] for number, places in self._fresh.items()}, world)
        self._since, changed, self._taken = len(self._earlier), self._taken > 0, 0
        if not self._paired:
            self._over = True
            return not changed
        self._splits = self._splits + 1 if changed else MOST_SPLITS
        if not changed and not self._over:
            self._begin_fresh(paired=False)
            return not self._fresh
        return not changed

    def _judged_duels(self, world: World) -> "list[Duel]":
        """What held-out images say of each fresh map. Collective."""
        world.all_reduce_(self._duels)
        count, total, squares, present = self._duels.T
        count = count.clamp_min(1e-12)
        mean = total / count
        error = ((squares / count - mean.square()).clamp_min(0) / count).sqrt()
        each = torch.stack([mean, error, mean + present / count, total], 1).tolist()  # host sync
        self._duels.zero_()
        self._fresh_banks.clear()
        return [Duel(*values) for values in each]

    def _split(self, duels: "Mapping[int, Duel]", world: World) -> None:
        """Put pairs that are better in the places of their class and of an empty one, the best first. Collective.

        Two maps of one structure may be a little better than one: they are left.
        """
        going, empty = self._going[0], self._empty()
        for number in sorted(duels, key=lambda number: -duels[number].total):
            places, share = self._fresh.pop(number), self._pairs.share[number]
            if not empty or not duels[number].better or self._alike(places, share.tolist(), world):  # host sync
                continue
            for place, slot in zip(places, (number, empty[0]), strict=True):
                self._put(place, going * self._classes + slot)
            self._balance.split(going, number, empty.pop(0), share)
            self._taken += 1

    def _alike(self, places: Sequence[int], shares: Sequence[float], world: World) -> bool:
        """Whether maps at two places of the sums show the same. Collective."""
        same = torch.zeros(1, device=self._grid.device)
        if world.is_leader:
            maps = [self._joint_map(place).cpu() for place in places]
            halves = [fsc(*self._halves(place)).cpu() for place in places]
            same += any(other is not None for other in alike(maps, halves, shares, SHELLS, ALIKE))
        world.all_reduce_(same)
        return bool(same)  # host sync

    def _put(self, source: int, place: int) -> None:
        """A fresh map's sums in another place."""
        for tensor in self._sums.tensors():
            tensor[place] = tensor[source]


class Duel(NamedTuple):
    """What held-out images of a class say of a fresh map, or of a pair: their mean gain over its present map, the
    standard error, their mean gain over an empty map, and their summed gain over the present one."""

    mean: float
    error: float
    gained: float
    total: float

    @property
    def better(self) -> bool:
        """Whether beyond the error."""
        return self.mean > BETTER * self.error
