"""Two structures that share a class for good are parted, where another class is empty.

Nothing in the mixture parts them: one map that holds both, each in views of its own, explains them better than any
other class does, and the class whose images they took is given up. So where a class is empty once classes have settled,
each of the others gets a pair of maps that compete for its images: its own, and one from random poses, which for some
rounds gets half of the images, those that the other explains least well. Of one structure the second map soon shows
what the first one shows, and the pair goes. Of two, each map comes to hold one, held-out images of the class are
explained better by the pair than by its one map, beyond the error, and the empty class takes the second.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.likeness import likeness
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_restarts import FRESH, ClassRestarts, Duel
from scalecryo.train.stages.class_shares import Balance
from scalecryo.train.stages.class_start import ALIKE, SHELLS
from scalecryo.train.stages.start_rounds import DECAY

logger = logging.getLogger(__name__)
MOST_SPLITS = 3  # times that pairs are tried: what is parted may be joined again
EVEN_ROUNDS = 2  # in which both maps of a pair get the same share of the class's images


class ClassSplits(ClassRestarts):
    """The start of several classes, pairs of maps for each where one is empty, then fresh starts of each.

    The fresh maps of a class are its pair, as long as pairs compete.
    """

    def __init__(self, context: RunContext, learned: Learned, *, classes: int = 0, starts: int = 0) -> None:
        """See `ClassStart`."""
        super().__init__(context, learned, classes=classes, starts=starts)
        self._paired = False  # whether the fresh maps of a class compete for its images
        self._splits = 0  # times that pairs were tried; `MOST_SPLITS` where they parted nothing
        self._pairs = Balance(self._classes, FRESH, context.device)  # of each class
        self._pair_mass = torch.zeros_like(self._pairs.mass)  # of this step

    def _standing(self) -> dict[str, Any]:
        return super()._standing() | {"paired": self._paired, "splits": self._splits}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._paired, self._splits = standing["paired"], standing["splits"]

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), *self._pairs.tensors()]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        self._pair_mass.zero_()
        super()._learn(batch, world)
        if self._paired:
            self._pairs.add(self._pair_mass, DECAY, even=len(self._earlier) < self._since + EVEN_ROUNDS)

    def _beside(self) -> Sequence[Tensor]:
        return [*super()._beside(), self._pair_mass]

    def _weights(
        self, number: int, images: ParticleImages, share: Float[Tensor, " b"], grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b places"]:
        """As pairs share the images; in their first step these go to both in turn."""
        if not self._paired:
            return super()._weights(number, images, share, grid)
        if self._step == self._begun:
            maps = torch.arange(FRESH, device=share.device)
            of_pair = (torch.arange(len(images), device=share.device)[:, None] % FRESH == maps).float()
        else:
            of_pair = self._pair_evidence(number, images, grid).softmax(1).float()
        weights = share[:, None] * of_pair
        self._pair_mass[number] += weights.sum(0)
        return weights

    def _pair_evidence(
        self, number: int, images: ParticleImages, grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b two"]:
        """Of images for each map of a pair, its share included."""
        return super()._fresh_evidence(number, images, grid) + self._pairs.log_prior[number].log_softmax(0)

    def _fresh_evidence(
        self, number: int, images: ParticleImages, grid: Float[Tensor, "h 3 3"]
    ) -> Float[Tensor, "b judged"]:
        """A pair is judged as one."""
        if not self._paired:
            return super()._fresh_evidence(number, images, grid)
        return self._pair_evidence(number, images, grid).logsumexp(1, keepdim=True)

    def _begin_next(self) -> None:
        """Pairs, where a class is empty."""
        if self._splits < MOST_SPLITS and len(self._held()) < self._classes:
            self._begin_pairs()
        else:
            super()._begin_next()

    def _begin_pairs(self) -> None:
        """A pair for every class that holds particles, from the next step on."""
        self._begin_fresh()
        self._paired = True
        for number, (first, _) in self._fresh.items():
            self._put(self._going[0] * self._classes + number, first)
            for own, common in zip(self._noises[first].tensors(), self._noise.tensors(), strict=True):
                own.copy_(common)
            self._unposed.discard(first)
        for tensor in self._pairs.tensors():
            tensor.zero_()

    def _compare(self, world: World) -> bool:
        """After a round: whether any pair is to be taken, or pairs to go on; the end where none is. Collective."""
        if not self._paired:
            return super()._compare(world)
        duels, told, better = self._judged_duels(world), [], {}
        for number, pair in list(self._fresh.items()):
            duel = duels[pair[0]]
            grows, alike = self._grows(number, duel), self._likeness(pair, world)
            taken = duel.better and alike < ALIKE
            told.append(f"class {number + 1}: {duel}, alike by {alike:.2f}{', better' if taken else ''}")
            if taken:
                better[number] = duel
            elif alike >= ALIKE or not grows:
                del self._fresh[number]
        logger.info("start: held-out log-likelihood of images in two maps of their class over its one map: %s",
                    "; ".join(told))  # fmt: skip
        if better:
            self._split(better)
        if self._fresh:
            return False
        self._paired, self._since = False, len(self._earlier)
        self._splits = self._splits + 1 if better else MOST_SPLITS
        if not better:
            super()._begin_next()
        return not self._fresh and not better

    def _split(self, better: Mapping[int, Duel]) -> None:
        """Put pairs in the places of their class and of an empty one, the best first; no pair goes on."""
        going, held = self._going[0], self._held()
        empty = [number for number in range(self._classes) if number not in held]
        ordered = sorted(better, key=lambda number: -better[number].total)
        for number, other in zip(ordered, empty, strict=False):
            for place, into in zip(self._fresh[number], (number, other), strict=True):
                self._put(place, going * self._classes + into)
            self._balance.split(going, number, other, self._pairs.share[number])
        self._fresh = {}

    def _likeness(self, pair: Sequence[int], world: World) -> float:
        """By how much two maps correlate, over what maps of one structure would. Collective."""
        found = torch.zeros(1, device=self._grid.device)
        if world.is_leader:
            (first, second), (one, other) = self._to_compare(pair)
            found += likeness(first, second, (one, other), SHELLS)
        world.all_reduce_(found)
        return float(found)  # host sync
