"""How many structures there are, and a first map of each, from many cheap starts (`train.classes = auto`).

No single start of K classes tells how many structures there are: K too small mixes them, K too large splits them, and a
random start may do both. Yet what different starts agree on is there: so many starts with several K are made, cheaply
(half of the images, few rotations, low frequencies, few steps); then all particles (at most `MOST_LABELLED`) are put
into their most likely class of every start, in one streamed pass, and the labels are compared (`evaluate.consensus`).
The class that agrees best with a group of particles lends it its map.

Starts are learnt one after the other on each worker, and side by side on several: each worker reads whole batches and
makes starts of its own, without any collective, so that a start does not depend on the number of workers. A checkpoint
follows each start (of every worker).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.evaluate.consensus import Consensus, LabelTuples, consensus, start_weight
from scalecryo.map.backprojection import PADDING
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.reference import reference_transform
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import grid_evidence, templates, turned_grid
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.particle_state import RowColumns
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_start import ClassStart
from scalecryo.train.stages.start_rounds import NO_SIGNAL_ERRORS, SAVE_EVERY

logger = logging.getLogger(__name__)
RADIUS, HALF_GRID = 8.0, 576  # Fourier pixels that are compared; rotations, which with their flips are 19° apart
EVEN = 0.4  # of a start's steps, in which every class gets the same share
LABEL_BATCH, MOST_LABELLED = 256, 20_000
MOST_GROUPS = 64
SEED = 10_000  # of the first start
CHUNK = 50_000  # rows of labels that are looked at together


class EnsembleStart(ClassStart):
    """One cheap start, on this worker alone."""

    radius, half_grid = RADIUS, HALF_GRID

    def __init__(self, context: RunContext, learned: Learned, classes: int, number: int) -> None:
        """
        Args:
            context: of the run.
            learned: as it stands; gets nothing.
            classes: of this start.
            number: among all starts.
        """
        self._number = number
        super().__init__(replace(context, world=World()), replace(learned), classes=classes, starts=1)
        settings = context.config.guided
        self._batch = max(settings.bootstrap_batch, settings.bootstrap_batch * classes // 4)
        self._steps = settings.ensemble_steps

    def request(self) -> BatchRequest:
        """All of its batches, other ones than those of other starts."""
        start = self._number * self._steps
        return BatchRequest((self._pixels,), self._batch, start=start, batches=self._steps, whole=True)

    def learnt(self) -> "LearntStart":
        """What labels are made by."""
        pixel_weight = self._noise.pixel_weight(self._near)
        maps, balance = torch.stack(self._solved(0)), self._balance
        return LearntStart(maps, balance.log_prior[0].clone(), balance.mass[0].clone(), pixel_weight)

    @property
    def _even(self) -> bool:
        return self._step < EVEN * self._steps

    def _seed(self, number: int) -> int:
        return super()._seed(number) + SEED + self._number


@dataclass(frozen=True)
class LearntStart:
    """A start that has learnt.

    Attributes:
        maps: of its classes.
        log_prior: of its classes, up to a constant.
        mass: posterior mass of the particles in each class.
        pixel_weight: Hermitian weight over noise variance.
    """

    maps: Float[Tensor, "k n n n"]
    log_prior: Float[Tensor, " k"]
    mass: Float[Tensor, " k"]
    pixel_weight: Float[Tensor, " p"]

    @classmethod
    def empty(cls, classes: int, level: int, pixels: int, device: torch.device) -> "LearntStart":
        """Zeros, for what another worker has learnt."""
        double = torch.zeros(2, classes, dtype=torch.float64, device=device)
        maps = torch.zeros(classes, level, level, level, device=device)
        return cls(maps, double[0], double[1], torch.zeros(pixels, device=device))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.maps, self.log_prior, self.mass, self.pixel_weight


class Ensemble:
    """Passes that each learn one start on every worker; then one that labels particles, and finds the groups."""

    name = "ensemble"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the classes that were found.
        """
        settings = context.config.guided
        self._context, self._learned = context, learned
        # The costly ones first: workers end together.
        self._plan = sorted(settings.ensemble_classes * settings.ensemble_starts, reverse=True)
        self._level = min(context.store.levels)
        self._near = context.pixels(self._level, RADIUS)
        self._groups = ImageGroups(context.store.box_size, context.device)
        self._shifts = context.shift_grid_px(self._level, context.shift_radius)
        self._learnt: list[LearntStart] = []
        self._start: EnsembleStart | None = None  # that this worker learns
        self._banks: list[Complex[Tensor, "k h p"]] = []
        self._labels = RowColumns(context.run, context.store.count, {"labels": (len(self._plan),)})
        self._gains = torch.zeros(len(self._plan), 3, dtype=torch.float64, device=context.device)
        """Of each start's held-out particles: sum of the likelihood gains, of their squares, number."""
        self._steps, self._images, self._ended = 0, 0, False

    def request(self) -> BatchRequest:
        """The batches of this worker's next start; or, at last, those that are labelled."""
        self._steps, self._images, self._start = 0, 0, None
        if len(self._learnt) < len(self._plan):
            number = len(self._learnt) + self._context.world.rank
            last = len(self._plan) - 1
            start = EnsembleStart(self._context, self._learned, self._plan[min(number, last)], min(number, last))
            if number <= last:  # a worker without a start reads along: all passes have as many batches
                self._start = start
            return start.request()
        self._banks = [self._bank(number) for number in range(len(self._plan))]
        self._gains.zero_()
        self._labels.begin(self.name)
        epoch = self._context.order(self._level, LABEL_BATCH).steps_per_epoch
        batches = min(epoch, -(-MOST_LABELLED // LABEL_BATCH))
        return BatchRequest((self._near,), LABEL_BATCH, start=0, batches=batches)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """Learn from a batch, or label it."""
        (batch,) = images
        if self._banks:
            self._images += len(batch)
            self._label(self._groups.corrected(batch))
        elif self._start is not None:
            self._images += len(batch)
            if not self._learnt and self._steps < SAVE_EVERY:
                self._groups.add_residuals(batch.transforms, batch)
            self._start.step(batch)
        self._steps += 1

    def finish_pass(self, world: World) -> PassReport:
        """Share what was learnt; after the labels, find the groups. Collective.

        Raises:
            TrainingError: no start explains held-out images better than an empty map.
        """
        if self._banks:
            return self._finish_labels(world)
        first = len(self._learnt)
        if not first:
            world.all_reduce_(*self._groups.tensors())
            self._groups.update()
        for number in range(first, min(first + world.size, len(self._plan))):
            if number == first + world.rank and self._start is not None:
                learnt = self._start.learnt()
            else:
                device, pixels = self._context.device, len(self._near)
                learnt = LearntStart.empty(self._plan[number], self._level, pixels, device)
            world.all_reduce_(*learnt.tensors())
            self._learnt.append(learnt)
        self._start, count = None, len(self._learnt)
        kinds = ", ".join(str(classes) for classes in self._plan[first:count])
        message = f"ensemble: {count} of {len(self._plan)} starts have learnt (the last: {kinds} classes)"
        return PassReport(message, self._images, progress=count / (len(self._plan) + 1))

    def done(self) -> bool:
        """Whether classes were found."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """What the starts have learnt so far; the same on every worker."""
        learnt = [[tensor.cpu() for tensor in start.tensors()] for start in self._learnt]
        return {"settings": self._settings(), "learnt": learnt, "groups": self._groups.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many starts; under other settings, from the beginning."""
        if state["settings"] != self._settings():
            return
        device = self._context.device
        self._learnt = [LearntStart(*(tensor.to(device) for tensor in start)) for start in state["learnt"]]
        self._groups.load_state_dict(state["groups"])

    def _settings(self) -> str:
        config = self._context.config
        return f"{config.train.rows} {config.train.seed} {config.guided} {config.pose.centred}"

    def _bank(self, number: int) -> Complex[Tensor, "k h p"]:
        """Slices of the maps of a start, at a grid of its own."""
        generator = torch.Generator().manual_seed(self._context.config.train.seed + SEED + number)
        grid = turned_grid(so3_grid(HALF_GRID).to(self._context.device), generator)
        maps = self._learnt[number].maps
        made = [templates(reference_transform(one, PADDING), grid, self._near, PADDING) for one in maps]
        return torch.stack(made)

    def _label(self, batch: ParticleImages) -> None:
        """The most likely class of each image in every start; how much better than nothing held-out ones fit."""
        if not len(batch):
            return
        held_out = self._context.partition.held_out(batch.rows)
        hypotheses, labels = math.log(2 * HALF_GRID * len(self._shifts)), []
        for number, (start, bank) in enumerate(zip(self._learnt, self._banks, strict=True)):
            weight = start.pixel_weight
            each = [grid_evidence(batch.transforms, batch.ctf, weight, one, self._shifts, self._near) for one in bank]
            evidence = torch.stack(each, 1).double() + start.log_prior
            labels.append(evidence.argmax(1) + 1)  # 0: not seen
            gain = evidence.logsumexp(1)[held_out] - hypotheses - start.log_prior.logsumexp(0)
            self._gains[number] += torch.stack([gain.sum(), gain.square().sum(), gain.new_tensor(float(len(gain)))])
        self._labels.note_columns(batch.rows, {"labels": torch.stack(labels, 1)})

    def _finish_labels(self, world: World) -> PassReport:
        """Groups of the labelled particles, found by worker 0, and the maps that stand for them. Collective."""
        self._labels.commit(world)
        world.all_reduce_(self._gains)  # behind it all have read the labels
        gains = self._gains.cpu().numpy()  # host sync
        mean = gains[:, 0] / np.maximum(gains[:, 2], 1)
        error = np.sqrt(np.maximum(gains[:, 1] / np.maximum(gains[:, 2], 1) - mean**2, 0) / np.maximum(gains[:, 2], 1))
        weights = np.array([start_weight(start.mass.cpu().numpy()) for start in self._learnt])
        weights[mean < NO_SIGNAL_ERRORS * error] = 0
        if not weights.any():
            raise TrainingError(
                f"{self._context.config.run.data}: none of {len(weights)} starts found a structure: the best gains "
                f"{mean.max():.2f} ± {error[mean.argmax()]:.2f} in log-likelihood over an empty map: check contrast "
                "sign, pixel size and box, use more particles, or raise guided.ensemble_steps"
            )
        chosen = torch.full((MOST_GROUPS, 2), -1, dtype=torch.int64, device=self._context.device)
        report = PassReport("", self._images, checkpoint=False, progress=1.0)
        if world.is_leader:
            found = self._consensus(weights)
            chosen[: found.groups] = torch.tensor(found.best, device=chosen.device)
            report = self._told(report, found, mean, error, weights)
            self._labels.remove_pass()
        world.broadcast_(0, chosen)
        best = [(start, number) for start, number in chosen.tolist() if start >= 0]
        self._learned.first_maps = torch.stack([self._learnt[start].maps[number] for start, number in best])
        self._banks, self._learnt, self._ended = [], [], True
        return report

    def _consensus(self, weights: np.ndarray) -> Consensus:
        """Groups of the particles with labels; memory is that of as many tuples as there are labelled particles."""
        column = self._labels.columns()["labels"]
        parts = [column[first : first + CHUNK] for first in range(0, len(column), CHUNK)]
        labels = np.concatenate([part[part[:, 0] > 0].astype(np.int64) - 1 for part in parts])
        tuples, _ = LabelTuples.of(labels)
        seed = self._context.config.train.seed
        return consensus(tuples, self._plan, weights.tolist(), seed=seed, most=MOST_GROUPS)

    def _told(
        self, report: PassReport, found: Consensus, mean: np.ndarray, error: np.ndarray, weights: np.ndarray
    ) -> PassReport:
        """What was found, for log, report and curves."""
        for number, start in enumerate(self._learnt):
            shares = (start.mass / start.mass.sum()).sort(descending=True).values.tolist()
            logger.info(
                "ensemble: start %d of %d classes: held-out images gain %.2f ± %.2f over an empty map; weight %.2f; "
                "%.0f %% of its particles in classes of one group; classes hold %s %%",
                number + 1, self._plan[number], mean[number], error[number], weights[number] / weights.max(),
                100 * found.purity[number], " ".join(f"{100 * share:.0f}" for share in shares),
            )  # fmt: skip
        held = ", ".join(f"{100 * share:.0f}" for share in found.shares)
        values = ", ".join(f"{value:.2f}" for value in found.eigenvalues[: found.groups + 2])
        noun = "class" if found.groups == 1 else "classes"
        note = (
            f"auto: {found.groups} {noun} from {len(self._plan)} starts: shares {held} %, "
            f"{100 * found.unassigned:.0f} % of the particles unassigned; confusion between starts at most "
            f"{found.confusion:.2f} (0: no start mixes two classes, 1: all do)"
        )
        self._learned.notes += (note,)
        figures = {
            "ensemble/classes": float(found.groups), "ensemble/starts": float(len(self._plan)),
            "ensemble/confusion": found.confusion, "ensemble/unassigned": found.unassigned,
            "ensemble/purity": float(np.average(found.purity, weights=weights)),
        }  # fmt: skip
        told = f"{note}; starts agree on directions by {values}, counted from {found.threshold:.2f} on"
        return replace(report, message=told, figures=figures)
