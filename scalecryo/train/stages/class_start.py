"""From random poses to K first maps: stochastic expectation maximisation over class and pose together.

As the start of one map (`bootstrap`), with the posterior of each image spread over the poses of K maps. All images learn
the same K maps, so that classes need not be matched between halves; the sums of the two halves are kept apart, and what
they share tells how far each first map is to be believed. Each half then goes on by itself.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet, reference_transform
from scalecryo.physics.image_formation import CtfWeightedImages, ctf_weighted
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.expectation import expected_slices
from scalecryo.pose.search import templates, turned_grid
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.bootstrap import DECAY, HALF_GRID, JUDGED, RADIUS, READ_RADIUS, REGULARISATION, SAVE_EVERY
from scalecryo.train.stages.checks import check_contrast, check_count, check_images

logger = logging.getLogger(__name__)


class ClassStart:
    """K maps from each of several random starts; held-out likelihood of the mixture tells which goes on."""

    name = "start"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        check_count(context.count, context.config.run.data)
        self._context, self._learned = context, learned
        settings, level = context.config.guided, min(context.store.levels)
        self._classes, self._starts = context.config.train.classes, settings.starts
        self._steps = settings.bootstrap_steps
        self._batch = settings.bootstrap_batch * self._classes // 2
        self._judging = max(1, min(JUDGED, context.count) // self._batch)
        self._pixels = context.pixels(level, min(level / 2 - 1, READ_RADIUS))
        self._near = self._pixels.prefix(RADIUS)
        self._shifts = context.shift_grid_px(level)
        self._grid = so3_grid(HALF_GRID).to(context.device)
        self._noise = NoiseSpectrum(int(self._pixels.shell.max()) + 1, context.device)
        self._sums = Backprojection(level, device=context.device, classes=self._starts * self._classes)
        self._mass = torch.zeros(self._starts, self._classes, dtype=torch.float64, device=context.device)
        self._bias = torch.zeros_like(self._mass)
        self._going = list(range(self._starts))
        self._round, self._step, self._judged, self._images, self._ended = 1, 0, 0, 0, False

    def request(self) -> BatchRequest:
        left = self._round * self._steps - self._step
        self._images = 0
        if not left:
            return BatchRequest((self._pixels,), self._batch, start=0, batches=self._judging)
        batches = min(SAVE_EVERY - self._step % SAVE_EVERY, left)
        return BatchRequest((self._pixels,), self._batch, start=self._step, batches=batches)

    def step(self, *images: ParticleImages) -> None:
        (batch,) = images
        self._images += len(batch)
        held_out = self._context.partition.held_out(batch.rows)
        if self._step == 0:
            check_images(batch, self._context.config.run.data)
        if self._step < self._round * self._steps:
            self._learn(batch.select(~held_out), self._context.world)
            self._step += 1
        else:
            self._judge(batch.select(held_out))
            self._judged += 1

    def _learn(self, batch: ParticleImages, world: World) -> None:
        noise, near = self._noise, self._near
        if self._step == 0:
            noise.add(batch.transforms, None, self._pixels)
            world.all_reduce_(*noise.tensors())
        noise.decay(DECAY)
        residuals = NoiseSpectrum(len(noise.power), near.kx.device)
        fresh = Backprojection(near.box_size, device=near.kx.device, classes=self._sums.classes)
        mass = torch.zeros_like(self._mass)
        for start in self._going:
            self._insert(batch, start, fresh, residuals, mass)
        parts = fresh.within(RADIUS)
        world.all_reduce_(*residuals.tensors(), mass, *parts)
        noise.power += residuals.power
        noise.count += residuals.count
        fresh.put_within(RADIUS, *parts)
        self._sums.decay(DECAY)
        self._sums.numerator += fresh.numerator
        self._sums.denominator += fresh.denominator
        self._mass = DECAY * self._mass + mass
        share = self._mass / self._mass.sum(1, keepdim=True).clamp_min(1e-30)
        self._update_bias(share)

    BALANCE = 1e9
    FLOOR = 0.2

    def _update_bias(self, share):
        K = self._classes
        if self._step < self.BALANCE:
            self._bias -= 0.3 * (share * K).clamp_min(1e-2).log()
            self._bias -= self._bias.mean(1, keepdim=True)
        else:
            self._bias = share.clamp_min(self.FLOOR / K).log()

    def _insert(self, batch, start, fresh, residuals, mass) -> None:
        near, device, K = self._near, self._near.kx.device, self._classes
        if self._step == 0:
            count = len(batch)
            near_batch = batch.within(RADIUS)
            generator = torch.Generator().manual_seed(self._seed(start) + 1009 * self._context.world.rank)
            rotation = random_rotations(count, generator).to(device)
            shift = self._shifts[torch.randint(len(self._shifts), (count,), generator=generator)]
            index = torch.arange(count, device=device) % K + start * K
            weighted, ones = ctf_weighted(near_batch.transforms, near_batch.ctf), torch.ones(count, device=device)
            fresh.add(weighted, rotation, shift, ones, batch.half, near, index)
            mass[start] += 1.0 * count / K
            return
        grid = turned_grid(self._grid, self._generator(start, self._step))
        banks, scale = self._banks(start, grid)
        weight = self._noise.pixel_weight(near)
        prior = self._bias[start].float().repeat_interleave(len(grid))
        centred, ones = grid.new_zeros(len(grid), 2), grid.new_ones(len(grid))
        for half in (1, 2):
            images = batch.select(batch.half == half).within(RADIUS)
            if not len(images):
                continue
            found = expected_slices(images.transforms, images.ctf, weight, banks, self._shifts, near, log_prior=prior)
            for number in range(K):
                rows = slice(number * len(grid), (number + 1) * len(grid))
                slices = CtfWeightedImages(found.slices.values[rows], found.slices.power[rows])
                fresh.insert(slices, grid, centred, ones, near, class_index=start * K + number, half=half)
            mass[start] += found.mass.sum(0).view(K, -1).sum(1)
            residuals.add_power(found.residual, len(images), near)

    def _banks(self, start, grid):
        references = [self._reference(start, number) for number in range(self._classes)]
        return torch.cat([templates(r.transform, grid, self._near, r.scale) for r in references]), references[0].scale

    def _solved(self, start, number):
        sums = self._sums
        whole = Backprojection(sums.box_size, sums.scale, "meta")
        at = start * self._classes + number
        whole.numerator, whole.denominator = (t[at].sum(0, keepdim=True)[None] for t in sums.tensors())
        return whole.solve_one(0, 1, REGULARISATION)

    def _reference(self, start, number) -> Reference:
        solved = self._solved(start, number)
        return Reference(reference_transform(solved, self._sums.scale), self._sums.scale, self._noise)

    def _seed(self, number: int) -> int:
        return self._context.config.train.seed + number

    def _generator(self, start, step):
        return torch.Generator().manual_seed(1_000_003 * self._seed(start) + 2 * step)

    def done(self): return self._ended
