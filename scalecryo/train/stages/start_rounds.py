"""Rounds of stochastic expectation maximisation at low resolution: what the start of one map and of several share.

A round learns from `guided.bootstrap_steps` batches, then maps are judged by particles that none of them has learnt
from. Sums forget quickly, and so does the noise spectrum that all maps share.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.runs.paused import Pause
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.checks import FirstLook, check_count

RADIUS = 12.0  # Fourier pixels that are compared
READ_RADIUS = 14.0  # Fourier pixels that are read: the noise is estimated a little beyond what is compared
HALF_GRID = 2304
DECAY = 0.9
REGULARISATION = 0.05
SAVE_EVERY = 20
JUDGED = 8000  # particles that are read to judge; a tenth of them is held out
NO_SIGNAL_ERRORS = 3.0  # a gain within so many standard errors of nothing is no structure
FIRST_REFERENCE_RADIUS = 12.0


class StartRounds(ABC):
    """Batches in rounds, the maps' sums and their noise; what is learnt and how it is judged, subclasses say."""

    name = "start"
    radius = RADIUS
    half_grid = HALF_GRID

    def __init__(self, context: RunContext, learned: Learned, *, batch: int, maps: int) -> None:
        """
        Args:
            context: of the run.
            learned: gets the references.
            batch: particles in a batch, of both halves and all workers.
            maps: pairs of half-maps that are learnt side by side.

        Raises:
            TrainingError: too few particles take part.
        """
        check_count(context.count, context.config.run.data)
        self._context, self._learned = context, learned
        self._groups = learned.groups = ImageGroups(context.store.box_size, context.device)
        self._look = FirstLook(context.config.run.data)
        level = min(context.store.levels)
        self._steps = context.config.guided.bootstrap_steps
        self._read_in(batch)
        self._pixels = context.pixels(level, min(level / 2 - 1, READ_RADIUS))
        self._near = self._pixels.prefix(self.radius)
        self._shifts = context.shift_grid_px(level, context.shift_radius)
        self._grid = so3_grid(self.half_grid).to(context.device)
        self._noise = NoiseSpectrum(int(self._pixels.shell.max()) + 1, context.device)
        self._sums = Backprojection(level, device=context.device, classes=maps)
        self._step = 0  # batches learnt from
        self._earlier: list[float] = []  # likelihood gain of the best in each round
        self._judged, self._images = 0, 0
        self._ended = False

    def _read_in(self, batch: int) -> None:
        """Read so many particles at once."""
        self._batch, self._judging = batch, max(1, min(JUDGED, self._context.count) // batch)

    def request(self) -> BatchRequest:
        """Some steps until the next checkpoint, or all batches that judge."""
        left = self._end_of_round - self._step
        self._images = 0
        if not left:
            return BatchRequest((self._pixels,), self._batch, start=0, batches=self._judging)
        batches = min(SAVE_EVERY - self._step % SAVE_EVERY, left)
        return BatchRequest((self._pixels,), self._batch, start=self._step, batches=batches)

    def step(self, *images: ParticleImages) -> None:
        """Learn from a batch, or judge by its held-out particles."""
        (batch,) = images
        self._images += len(batch)
        held_out = self._context.partition.held_out(batch.rows)
        if self._step < self._first_pass:
            self._look.add(batch)
            # Of each optics group: an image is noise, but for a few per cent.
            self._groups.add_residuals(batch.transforms, batch)
        batch = self._groups.corrected(batch)
        if self._step < self._end_of_round:
            self._learn(batch.select(~held_out), self._context.world)
            self._step += 1
        else:
            self._judge(batch.select(held_out))
            self._judged += 1

    def pause(self) -> Pause | None:
        """Not before a checkpoint, which is near; what is judged is judged again."""
        return Pause() if self._judged else None

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """Nothing was kept within a pass."""
        return self.request()

    def done(self) -> bool:
        """Whether a start was chosen."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """Sums, noise and where it stands; the same on every worker."""
        tensors = [tensor.cpu() for tensor in self._tensors()]
        groups = self._groups.state_dict()
        return {"standing": self._standing(), "settings": self._settings(), "tensors": tensors, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many steps; under other settings, from the beginning."""
        if state["settings"] != self._settings():
            return
        self._take_up(state["standing"])
        self._groups.load_state_dict(state["groups"])
        for own, saved in zip(self._tensors(), state["tensors"], strict=True):
            own.copy_(saved)

    @abstractmethod
    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of all maps. Collective."""

    @abstractmethod
    def _judge(self, batch: ParticleImages) -> None:
        """Note how well held-out particles are explained."""

    def _standing(self) -> dict[str, Any]:
        return {"step": self._step, "earlier": list(self._earlier)}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        self._step, self._earlier = int(standing["step"]), list(standing["earlier"])

    def _settings(self) -> str:
        """What the random starts depend on; the last number, on what they do."""
        config = self._context.config
        return f"{config.train.rows} {config.train.seed} {config.train.classes} {config.guided} {config.pose.centred} 4"

    def _tensors(self) -> list[Tensor]:
        return [*self._noise.tensors(), *self._sums.tensors()]

    @property
    def _first_pass(self) -> int:
        """Steps before the first checkpoint."""
        return min(SAVE_EVERY, self._steps)

    @property
    def _end_of_round(self) -> int:
        """Step at which the present round ends and is judged."""
        return (len(self._earlier) + 1) * self._steps

    @property
    def _here(self) -> tuple[int, int]:
        """Batches of the present round that were read, and how many it has."""
        return self._steps - (self._end_of_round - self._step) + self._judged, self._steps + self._judging

    def _begin_step(self, batch: ParticleImages, world: World) -> tuple[Backprojection, NoiseSpectrum]:
        """Sums of one step, empty; before the first, the noise is the power of the images. Collective."""
        if self._step == 0:
            self._begin(batch, world)
        self._noise.decay(DECAY)
        device, box_size = self._near.kx.device, self._near.box_size
        fresh = Backprojection(box_size, device=device, classes=self._sums.classes)
        return fresh, NoiseSpectrum(len(self._noise.power), device)

    def _begin(self, batch: ParticleImages, world: World) -> None:
        self._noise.add(batch.transforms, None, self._pixels)
        world.all_reduce_(*self._noise.tensors())

    def _end_step(self, world: World, fresh: Backprojection, residuals: NoiseSpectrum, *more: Tensor) -> None:
        """Take in the step's sums of all workers; `more` is added up in the same reduction. Collective."""
        # All sums on every worker, not each on its owner: in every step every worker slices every map, and worker 0
        # saves all sums. Up to this radius they are half a megabyte a map.
        parts = fresh.within(self.radius)
        world.all_reduce_(*residuals.tensors(), *more, *parts)
        self._noise.power += residuals.power
        self._noise.count += residuals.count
        fresh.put_within(self.radius, *parts)
        self._sums.decay(DECAY)
        self._sums.numerator += fresh.numerator
        self._sums.denominator += fresh.denominator
        if self._step == self._first_pass - 1:
            self._look.end()
            world.all_reduce_(*self._groups.tensors())
            self._groups.update()

    def _random_poses(self, count: int, number: int) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """Of the first step of a random start: others on every worker; the turned grids of later steps are the same."""
        generator = torch.Generator().manual_seed(self._seed(number) + 1009 * self._context.world.rank)
        rotation = random_rotations(count, generator).to(self._grid.device)
        return rotation, self._shifts[torch.randint(len(self._shifts), (count,), generator=generator)]

    def _seed(self, number: int) -> int:
        return self._context.config.train.seed + number

    def _to_centre(self, maps: Float[Tensor, "m n n n"], shown: Float[Tensor, "n n n"]) -> Float[Tensor, "m n n n"]:
        """Maps moved so that what is shown has its centre of mass at the box centre; shifts are searched about it.

        Where particles are known to be centred, so is their map.
        """
        if not self._context.fit_shift:
            return maps
        off = centre_of_mass(shown, mask_from_map(shown, self._context.store.level_pixel_size(shown.shape[-1])))
        still = torch.eye(3, device=maps.device)
        return torch.stack([linear_map(one, still, -off) for one in maps])

    def _refuse_noise(self, gain: float, error: float, told: str) -> None:
        """Refuse maps that explain held-out images no better than an empty one.

        Raises:
            TrainingError: so it is.
        """
        if gain < NO_SIGNAL_ERRORS * error:
            raise TrainingError(
                f"{self._context.config.run.data}: the start found no structure: {told}: check contrast sign, pixel "
                "size and box, use more particles, or raise guided.bootstrap_steps and guided.starts"
            )
