"""The auto-encoder: encoder and half-maps learnt together from random starts, end to end, at rising resolution.

First a look at some images tells noise and brightness. Then several random starts compete; the one that explains
held-out images best goes on, from the smallest level of the store to the training level, while the radius that is
compared rises. At last particles that were never learnt from tell whether there is structure.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError, TrainingError
from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.map.reference import ReferenceSet
from scalecryo.map.running_maps import RunningMaps
from scalecryo.model.circle_encoder import CircleEncoder, CircleTransform
from scalecryo.model.volume import Volume
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.circle_source import encoder_input
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.paused import Pause
from scalecryo.train.autoencoder_training import AutoEncoderTrainer, Maps, StepPlan, Whitening
from scalecryo.train.march import March
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.random_starts import PairedGains, RandomStarts, copied, round_told
from scalecryo.train.stage import Learned
from scalecryo.train.stages.checks import FirstLook, check_contrast, check_count
from scalecryo.train.voxel_maps import VoxelMaps

logger = logging.getLogger(__name__)
LOOK_BATCHES, LOOK_SIZE = 4, 256
LAST_RATE = 0.1  # of the learning rate, as a share of the first
MEMORY_SHARE = 0.25  # of the images seen so far, that maps remember: poses settle, and noise averages out
PADDING = 1.0  # of running maps: their gridding correction makes up for it, and a step costs an eighth
JUDGE_BATCHES = 8
START_JUDGES, HELD_OUT_MOST = 16, 48  # batches that judge starts; held-out images of one, a tenth of it on average
NO_SIGNAL_ERRORS = 3.0  # a gain within so many standard errors of nothing is no structure
RECENT_POSES = 1024
LEAST_RADIUS, BEYOND = 12.0, 3.0  # Fourier pixels that particles are refined with: so far past the halves' FSC of 0.5


class AutoEncoding:
    """Passes: a look, each random start, then some steps at a time, then held-out particles."""

    name = "auto-encoder"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the encoder, and half-maps.

        Raises:
            TrainingError: too few particles take part.
        """
        check_count(context.count, context.config.run.data)
        self._context, self._learned = context, learned
        settings, levels = context.config.autoencoder, context.levels
        self._march = March(levels, settings.steps, settings.level_steps)
        self._noise = BackgroundNoise(context.pixels(max(levels)), context.device)
        self._circle_sums = torch.zeros(2, context.config.encoder.circles, dtype=torch.float64, device=context.device)
        self._white: Whitening | None = None
        self._trainer = autoencoder_trainer(context)
        learned.encoder, learned.steps = self._trainer, self._march.steps
        self._starts = RandomStarts(settings.starts, settings.start_steps, settings.steps)
        self._judges: list[tuple[Tensor, ParticleImages]] = []  # circles and white images of held-out particles
        self._step, self._until = 0, -1  # of the march, and where the pass under way ends; -1: none is
        self._first_look = FirstLook(context.config.run.data)
        self._batches = 0  # read in all
        self._losses: list[Tensor] = []
        self._gains = torch.zeros(3, dtype=torch.float64, device=context.device)
        """Of held-out particles: sum of the gains, of their squares, number."""
        self._images, self._done = 0, False
        self._recent: deque[tuple[Tensor, Tensor]] = deque()

    def request(self) -> BatchRequest:
        """The next pass, at its level."""
        config = self._context.config
        self._images = 0
        self._losses.clear()
        if self._white is None:
            return self._read(max(self._march.levels), LOOK_BATCHES, LOOK_SIZE)
        if not self._starts.over and self._starts.judging:
            batches = min(START_JUDGES, math.ceil(self._context.count / LOOK_SIZE))
            return self._read(self._march.levels[0], batches, LOOK_SIZE, start=0)
        if not self._starts.over:
            return self._read(self._march.levels[0], self._starts.next_steps)
        if self._step < self._march.steps:
            every = (config.monitor.every, config.monitor.pictures_every, config.train.checkpoint_every)
            due = min((self._step // period + 1) * period for period in every) - self._step
            batches = min(due, self._march.rest(self._step))
            self._until = self._step + batches
            return self._read(self._march.at(self._step).level, batches)
        return self._read(max(self._march.levels), JUDGE_BATCHES, LOOK_SIZE)

    def step(self, *images: ParticleImages) -> None:
        """Look at a batch, learn from it, or judge by its held-out particles."""
        (batch,) = images
        self._images += len(batch)
        if self._white is None:
            self._look(batch)
        elif not self._starts.over and self._starts.judging:
            self._hold(batch)
        elif not self._starts.over:
            self._learn(batch, self._starts.place(len(self._losses)), first=not self._losses)
        elif self._step < self._march.steps:
            self._learn(batch, self._step)
            self._step += 1
        else:
            self._judge(batch)

    def finish_pass(self, world: World) -> PassReport:
        """What the pass came to. Collective.

        Raises:
            TrainingError: the loss is no number, or the maps explain held-out images no better than nothing.
        """
        if self._white is None:
            return self._finish_look(world)
        if not self._starts.over:
            return self._finish_round(world) if self._starts.judging else self._finish_start()
        if self._step < self._march.steps or self._losses:
            return self._finish_steps()
        return self._finish(world)

    def pause(self) -> Pause | None:
        """Between two steps where maps are solved, since it begins with solved ones; not while it looks or judges."""
        starts, learnt = self._starts, len(self._losses)
        step = self._step if starts.over else starts.place(learnt)
        within = 0 < step < self._march.steps if starts.over else 0 < learnt < starts.next_steps
        if not within or self._step == self._until or not self._march.at(step - 1).refresh:
            return None
        losses = torch.tensor([float(loss) for loss in self._losses])
        held = {"state": self.state_dict(), "maps": self._trainer.maps.state_dict(), "losses": losses}
        return Pause(held, reached=self._step)

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """The steps that are left."""
        self.load_state_dict(pause.common["state"])
        self._trainer.set_maps(self._loaded_maps(pause.common["maps"]))
        request = self.request()
        self._losses = list(pause.common["losses"].to(self._context.device))
        left = self._starts.next_steps - len(self._losses)
        return request if self._starts.over else replace(request, batches=left)

    def done(self) -> bool:
        """Whether held-out particles were judged."""
        return self._done

    def state_dict(self) -> dict[str, Any]:
        """Encoder, maps, noise, and the random starts that are left."""
        march, references = self._starts.over, self._learned.references
        return {
            "settings": self._settings(),
            "noise": self._noise.state_dict(),
            "starts": self._starts.state_dict(),
            "step": self._step, "batches": self._batches,
            "trainer": self._trainer.state_dict(),
            "maps": self._trainer.maps.state_dict() if march else None,
            "references": references.state_dict() if self._done and references is not None else None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many steps.

        Raises:
            CheckpointError: it was written under other settings.
        """
        if state["settings"] != self._settings():
            raise CheckpointError(
                f"{self._context.run.url}: its checkpoint was written with other settings of [autoencoder], [encoder], "
                "[pose] or train.box: use the settings that it was trained with"
            )
        self._noise.load_state_dict(state["noise"])
        self._know_noise()
        self._starts.load_state_dict(state["starts"])
        self._step, self._batches = int(state["step"]), int(state["batches"])
        self._trainer.load_state_dict(state["trainer"])
        if state["maps"] is not None:
            self._trainer.set_maps(self._loaded_maps(state["maps"]))
        if state["references"] is not None:
            self._learned.references = ReferenceSet.from_state_dict(state["references"], self._context.device)
            self._done = True

    def _settings(self) -> str:
        config = self._context.config
        return f"{config.autoencoder} {config.encoder} {config.pose} {config.volume.update} {self._march.levels}"

    def _read(self, level: int, batches: int, size: int = 0, start: int | None = None) -> BatchRequest:
        pixels = self._context.pixels(level)
        size = size or self._context.config.autoencoder.batch_size
        start = self._batches if start is None else start
        return BatchRequest((pixels,), size, start=start, batches=batches, padding=True)

    def _look(self, batch: ParticleImages) -> None:
        assert batch.real is not None, "read from the store"
        self._batches += 1
        self._first_look.add(batch)
        self._noise.add(batch.real, batch.optics_group, batch.weight)
        circles = encoder_input(batch, self._trainer.circles).square().mean(2).unflatten(1, (2, -1)).sum(1)
        self._circle_sums[0] += (circles * batch.weight[:, None]).sum(0)
        self._circle_sums[1] += batch.weight.sum()

    def _finish_look(self, world: World) -> PassReport:
        self._first_look.end()
        world.all_reduce_(*self._noise.tensors())
        world.all_reduce_(self._circle_sums)
        power, count = self._circle_sums
        self._trainer.encoder.scale.copy_((power / count / 2).clamp_min(1e-20).rsqrt())
        self._know_noise()
        return PassReport("auto-encoder: noise and brightness of the images", self._images)

    def _know_noise(self) -> None:
        """What follows from the images' noise and power."""
        self._white = Whitening(self._noise)
        self._learned.signal = self._noise.signal()

    def _learn(self, batch: ParticleImages, step: int, *, first: bool = False) -> None:
        """One step; the first of a start begins it."""
        assert self._white is not None, "a look comes first"
        self._batches += 1
        config, place = self._context.config, self._march.at(step)
        learnt = self._context.partition.held_out(batch.rows).logical_not()  # the others judge
        batch = replace(batch, weight=batch.weight * learnt)
        white = self._white(batch)
        settings, trainer = config.autoencoder, self._trainer
        if first and step == 0:
            self._begin_start(white)
        elif first:
            self._take_up(self._starts.states[self._starts.current])
        elif trainer.maps.level != place.level:
            trainer.look_for_symmetry()
            trainer.set_maps(trainer.maps.grown(place.level))
        share = 0.5 + 0.5 * math.cos(math.pi * step / self._march.steps)
        plan = StepPlan(
            radius=place.radius, rate=config.optim.encoder_rate * (LAST_RATE + (1 - LAST_RATE) * share),
            keep=1 - settings.batch_size / max(settings.remembered, MEMORY_SHARE * step * settings.batch_size),
            refresh=place.refresh or config.volume.update == "gradient",
        )  # fmt: skip
        norm = self._white.image_power(batch.pixels, place.radius)
        loss, rotation = trainer.step(batch, white, plan, norm)
        self._losses.append(loss)
        self._recent.append((batch.rows, rotation))
        while sum(len(rows) for rows, _ in self._recent) > RECENT_POSES and len(self._recent) > 1:
            self._recent.popleft()

    def _begin_start(self, white: ParticleImages) -> None:
        """Weights and maps of the next random start."""
        config, number = self._context.config, self._starts.current
        seed = 1000 * config.train.seed + number
        self._trainer.restart(seed)
        self._trainer.set_maps(self._first_maps(seed))
        self._trainer.insert_at_random(white, torch.Generator().manual_seed(seed))

    def _first_maps(self, seed: int) -> Maps:
        config, level, device = self._context.config, self._march.levels[0], self._context.device
        if config.volume.update == "average":
            return RunningMaps(level, PADDING, device)
        generator = torch.Generator().manual_seed(seed)
        return VoxelMaps(Volume(level, 2.0, True, 1.0, generator).to(device), config.optim.volume_rate)

    def _loaded_maps(self, state: Mapping[str, Any]) -> Maps:
        maps = self._first_maps(0)
        if state["level"] != maps.level:
            maps = maps.grown(state["level"])
        maps.load_state_dict(state)
        return maps

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with what a start has learnt. Collective."""
        self._trainer.load_state_dict(state["trainer"])
        self._trainer.set_maps(self._loaded_maps(state["maps"]))

    def _finish_start(self) -> PassReport:
        starts, loss = self._starts, float(torch.stack(self._losses).mean())  # host sync: once a pass
        self._refuse_nan(loss)
        turn = starts.turn(len(self._losses))
        starts.learnt(copied({"trainer": self._trainer.state_dict(), "maps": self._trainer.maps.state_dict()}))
        if starts.over:
            self._step = starts.steps
            starts.release()
        return PassReport(f"auto-encoder: {turn}: loss {loss:.4f}", self._images)

    @torch.no_grad()
    def _hold(self, batch: ParticleImages) -> None:
        """Keep the held-out images of a batch; as many of each, so that their number need not be known here."""
        assert self._white is not None, "a look comes first"
        batch = replace(batch, weight=batch.weight * self._context.partition.held_out(batch.rows))
        some = batch.select(batch.weight.argsort(descending=True, stable=True)[:HELD_OUT_MOST])
        self._judges.append((encoder_input(some, self._trainer.circles), self._white(some)))

    def _finish_round(self, world: World) -> PassReport:
        """The starts that explain held-out images better go on, the best one until it gains no more. Collective."""
        starts = self._starts
        paired = PairedGains(len(starts.going), self._context.device)
        gains = []
        for number in starts.going:
            self._take_up(starts.states[number])
            gains.append([self._trainer.refined_gains(circles, white) for circles, white in self._judges])
        for (_, white), *own in zip(self._judges, *gains, strict=True):
            paired.add(torch.stack(own), white.weight)
        self._judges.clear()
        world.all_reduce_(paired.sums)
        before, mean = list(starts.going), paired.mean().cpu()  # host sync: once a pass
        starts.judged(mean)
        if starts.over:
            self._take_up(starts.states[starts.going[0]])
            self._step = starts.steps
            starts.release()
        return PassReport(round_told(before, starts.going, mean, paired), self._images)

    def _finish_steps(self) -> PassReport:
        config, step, last = self._context.config, self._step, self._step == self._march.steps
        loss = float(torch.stack(self._losses).mean())  # host sync: once a pass
        self._until = -1
        self._losses.clear()
        self._refuse_nan(loss)
        due = {name: step % period == 0 or last for name, period in (
            ("scalars", config.monitor.every), ("pictures", config.monitor.pictures_every),
            ("checkpoint", config.train.checkpoint_every))}  # fmt: skip
        place = self._march.at(step - 1)
        found: dict[str, Any] = {}
        if due["pictures"]:
            rows, rotation = (torch.cat(parts).cpu() for parts in zip(*self._recent, strict=True))
            present = rows >= 0
            found = {"density": self._trainer.maps.maps().mean(0), "rows": rows[present], "rotation": rotation[present]}
        scalars = {"loss": loss, "radius": place.radius, "level": float(place.level)} if due["scalars"] else {}
        message = f"auto-encoder: step {step} of {self._march.steps}: {place.level} px, loss {loss:.4f}"
        return PassReport(
            message if due["scalars"] else "", self._images, step, scalars, checkpoint=due["checkpoint"],
            score=step / self._march.steps - loss, progress=step / self._march.steps, **found,
        )  # fmt: skip

    @torch.no_grad()
    def _judge(self, batch: ParticleImages) -> None:
        """How much better than an empty map the maps explain held-out particles."""
        assert self._white is not None, "a look comes first"
        white, trainer = self._white(batch), self._trainer
        found, _ = trainer.encoder.candidates(encoder_input(batch, trainer.circles))
        gain = trainer.gains(white, found)
        counted = batch.weight * self._context.partition.held_out(batch.rows)
        self._gains += torch.stack([(gain * counted).sum(), (gain.square() * counted).sum(), counted.sum()]).double()

    def _finish(self, world: World) -> PassReport:
        """The half-maps, where there is structure. Collective."""
        context, trainer = self._context, self._trainer
        assert self._white is not None, "a look comes first"
        world.all_reduce_(self._gains)
        total, squares, count = self._gains.tolist()  # host sync: once a run
        gain = total / max(count, 1.0)
        error = math.sqrt(max(squares / max(count, 1.0) - gain**2, 0.0) / max(count, 1.0))
        if gain < NO_SIGNAL_ERRORS * error:
            raise TrainingError(
                f"{context.config.run.data}: the auto-encoder found no structure: held-out images gain {gain:.2f} ± "
                f"{error:.2f} in log-likelihood over an empty map: check contrast sign, pixel size and box, use more "
                "particles, or raise autoencoder.steps and autoencoder.starts"
            )
        maps = trainer.maps.maps()
        check_contrast(maps.mean(0), context.config.run.data)
        level = trainer.maps.level
        references = ReferenceSet.of_maps(
            maps[None], context.store.level_pixel_size(level), noise=self._white.pooled, radius=level / 2 - 1
        )
        shell, angstrom = references.resolution(0.5)
        radius = max(LEAST_RADIUS, min(shell + BEYOND, level / 2 - 1))
        self._learned.references = replace(references, radius=radius)
        self._done = True
        message = f"auto-encoder: half-maps agree (FSC 0.5) to {angstrom:.1f} Å, held-out images gain {gain:.1f} nats"
        return PassReport(message, self._images, self._march.steps, score=1.0)

    def _refuse_nan(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} after {self._batches} batches: lower optim.encoder_rate or optim.volume_rate, then "
                "--resume from the last checkpoint"
            )


def autoencoder_trainer(context: RunContext) -> AutoEncoderTrainer:
    """The encoder and its optimiser, as the settings say. Collective."""
    config, store = context.config, context.store
    settings, level = config.encoder, min(context.levels)
    circles = CircleTransform(settings.circles)
    encoder = CircleEncoder(
        settings.circles, config.hidden, config.heads, config.copies, parameterisation=config.pose.parameterisation,
        centred=config.pose.centred,
    )  # fmt: skip
    return AutoEncoderTrainer(
        encoder.to(context.device), circles.to(context.device), context.pixels(level, circles.pixels.radius_limit),
        store.level_pixel_size(level), rate=config.optim.encoder_rate, search_radius=config.autoencoder.search_radius,
        world=context.world, reduce_dtype=config.optim.reduce_dtype,
    )  # fmt: skip
