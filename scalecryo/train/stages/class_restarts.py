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
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import reference_transform
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.search import grid_posterior, templates, turned_grid
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
        near = self._near
        for number, places in self._fresh.items():
            counted = share[:, number] > COUNTED
            own, weight = images.select(counted), share[counted, number]
            for place in places if len(own) else ():
                learnt = self._learnt[place]
                if self._step == self._begun:
                    rotation, shift = self._random_poses(len(own), SEED + 2 * place + half)
                    weighted = ctf_weighted(own.transforms, own.ctf)
                    fresh.insert(weighted, rotation, shift, weight, near, class_index=place, half=half)
                    learnt.add(own.transforms, weight, near)
                    continue
                bank, noise = self._fresh_bank(place, grid), self._noises[place]
                self._insert_of_class(own, weight, place, half, bank, grid, noise, fresh, learnt)

    def _judge_beside(self, images: ParticleImages, evidence: Float[Tensor, "b classes"]) -> None:
        if not self._fresh:
            return
        share, start = evidence.softmax(1), self._going[0]
        grid = turned_grid(self._grid, self._generator(start))
        present = evidence.double() - self._balance.log_prior[start]
        over = present - math.log(2 * len(self._grid) * len(self._shifts))
        weight = self._noise.pixel_weight(self._near)
        for number, places in self._fresh.items():
            counted = share[:, number] > COUNTED
            own, part = images.select(counted), share[counted, number].double()
            for place in places if len(own) else ():
                bank = self._fresh_bank(place, grid)
                each = grid_posterior(own.transforms, own.ctf, weight, bank, self._shifts, self._near, keep=1)
                gain = each.log_evidence.double() - present[counted, number]
                self._duels[place] += torch.stack(
                    [
                        part.sum(),
                        (part * gain).sum(),
                        (part * gain.square()).sum(),
                        (part * over[counted, number]).sum(),
                    ]
                )

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
        if self._over or len(self._earlier) >= self._most:
            return True
        self._begin_fresh()
        return not self._fresh

    def _begin_fresh(self) -> None:
        """Fresh maps of every class that holds particles, from the next step on."""
        going = self._going[0]
        share = self._balance.share[going].tolist()  # host sync
        others = [number for number in range(len(self._gains)) if number != going][:FRESH]
        held = [number for number in range(self._classes) if share[number] >= LEAST_SHARE]
        self._fresh = {number: [other * self._classes + number for other in others] for number in held}
        for place in (place for places in self._fresh.values() for place in places):
            for tensor in self._sums.tensors():
                tensor[place] = 0
        self._gained = dict.fromkeys(held, 0.0)
        self._begun, self._since = self._step, len(self._earlier)

    def _compare(self, world: World) -> bool:
        """After a round of fresh maps: whether any is to be taken, or to go on; the end where none is. Collective."""
        world.all_reduce_(self._duels)
        count, total, squares, present = self._duels.T.clone()
        mean = total / count.clamp_min(1e-12)
        error = ((squares / count.clamp_min(1e-12) - mean.square()).clamp_min(0) / count.clamp_min(1e-12)).sqrt()
        gained = mean + present / count.clamp_min(1e-12)
        rounds = len(self._earlier)
        young, last = rounds < self._since + LEAST_ROUNDS, rounds >= min(2 * self._since, self._most)
        told = []
        for number, places in list(self._fresh.items()):
            best = max(places, key=lambda place: float(mean[place]))  # host sync
            better = float(mean[best]) > BETTER * float(error[best])
            grown = young or float(gained[best]) > GROWS * self._gained[number]
            self._fresh[number], self._gained[number] = [best], float(gained[best])
            told.append(f"class {number + 1}: {mean[best]:+.2f} ± {error[best]:.2f}{', taken' if better else ''}")
            if better:
                self._put(best, self._going[0] * self._classes + number)
                self._taken += 1
            if better or last or not grown:
                del self._fresh[number]
        logger.info("start: held-out log-likelihood of images in a fresh map of their class over its present one: %s",
                    "; ".join(told))  # fmt: skip
        self._duels.zero_()
        self._fresh_banks.clear()
        if self._fresh:
            return False
        self._over, self._since = True, len(self._earlier)
        return not self._taken

    def _put(self, source: int, place: int) -> None:
        """A fresh map's sums in another place."""
        for tensor in self._sums.tensors():
            tensor[place] = tensor[source]
