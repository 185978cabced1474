"""The final pass: every particle a pose, both half-maps at the full box, and the results of the run."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError
from scalecryo.evaluate.verdict import incoherent, unfit
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.image_formation import CtfWeightedImages, ctf_weighted, ctf_weighted_on_padded_box
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.checkpoint import newest_step
from scalecryo.runs.class_results import figures_of, told_of
from scalecryo.runs.final_results import FinalParticles, FinalResults
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.paused import Pause
from scalecryo.runs.pictures import Examples
from scalecryo.runs.results import write_results
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages.final_poses import FinalPoses, ModelPoses, ReferencePoses

logger = logging.getLogger(__name__)
BATCH = 256
UNCERTAIN = 0.5  # mean confidence below which a person is told that most single poses are not to be relied on


class FinalPass:
    """One pass over all particles, also those never trained on; one that was killed goes on where it stood."""

    name = "final pass"

    def __init__(
        self, context: RunContext, learned: Learned, *, out: RunFolder | None = None, remember: bool = True
    ) -> None:
        """
        Args:
            context: of the run.
            learned: references or model, and poses of the particles seen before.
            out: where results go; None: the run's folder.
            remember: whether the store is the one trained on, so that remembered poses are of its particles.
        """
        self._context, self._learned, self._remember = context, learned, remember
        self._out = out or context.run
        self._found = ParticleState(self._out, context.store.count)
        self._sums: Backprojection | None = None
        self._poses: FinalPoses | None = None
        self._examples = Examples.none()
        self._pass, self._images, self._done = "", 0, False

    def request(self) -> BatchRequest:
        """Every particle in order, at the level that poses are found at and at the full box."""
        context = self._context
        # Of the particles and the checkpoint: what another one found counts for nothing.
        identity = f"{context.data_hash}-{newest_step(context.run)}"
        self._pass = f"final_{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
        self._poses = self._final_poses()
        full = context.pixels(context.store.box_size)
        self._sums = Backprojection(full.box_size, device=context.device, classes=self._classes())
        before = self._found.load_pass(self._pass)
        if before:
            logger.info("final pass: %d particles were posed before", before)
        self._found.begin(self._pass)
        same = self._poses.pixels.box_size == full.box_size
        pixels = (full,) if same else (self._poses.pixels, full)
        return BatchRequest(pixels, BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """Pose a batch and add it to its half's sums."""
        assert self._poses is not None, "request() comes first"
        assert self._sums is not None, "request() comes first"
        small, full = images[0], images[-1]
        # Groups of another store are others.
        groups = self._learned.groups if self._remember else None
        weighted = _weighted(full)
        if groups is not None:
            small, weighted = groups.corrected(small), groups.weighted(weighted, full)
        found, seen = self._found.read(small.rows)
        # The first batch is posed in any case: its pictures are wanted.
        if not len(self._examples) or not bool(seen.all()):  # host sync
            found = self._poses.estimate(small)
            self._show(small, found)
            self._found.note(small.rows, found, small.half)
        weight = self._poses.weight(found) * self._context.chosen(full.rows)
        pose = found.rotation, found.shift_px(full.pixel_size), weight
        self._sums.add(weighted, *pose, full.half, full.pixels, found.class_index)
        self._images += len(small)

    def _show(self, images: ParticleImages, found: PoseEstimates) -> None:
        """Keep the pictures of the surest and the least sure particles, of the first half, whose frame poses are in."""
        assert self._poses is not None, "request() comes first"
        own = images.rows_by_half[0]
        score = (found.confidence * found.particle_probability)[own].cpu()  # host sync
        at = self._examples.wanted(score)
        if len(at):
            rows = own[at.to(own.device)]
            self._examples = self._examples.with_more(self._poses.pictures(images, found, rows), score[at])

    def finish_pass(self, world: World) -> PassReport:
        """Sum over the workers, solve the maps; worker 0 writes the results. Collective."""
        context, sums = self._context, self._sums
        assert sums is not None, "request() comes first"
        owned, radius = OwnedSums(sums, world), sums.box_size / 2 - 1
        owned.reduce_(radius)
        if context.point_group is not None:
            owned.symmetrise(context.point_group.others, radius)
        with world.timer.part("solve"):
            solved = owned.solve()
        # What is done with is let go of: the sums are the largest thing in memory.
        sums.release()
        self._sums = None
        self._found.commit(world)
        message, figures = f"final pass: {context.store.count:,} particles posed", {}
        if world.is_leader:
            notes = self._uncertain()
            with world.timer.part("results"):
                results = self._write(solved, notes)
            cones = results.cones
            followed = self._out is context.run and self._remember and context.config.train.components > 0
            if not followed:  # components go on from them
                self._found.remove_pass(self._pass)
            unlike = unfit(results.junk, len(results.classes))
            for warning in (*notes, cones.warning, incoherent(results.coherent_share, results.coverage), unlike):
                if warning:
                    logger.warning("%s", warning)
            message += f", map to {cones.angstrom:.2f} Å (FSC 0.143), {cones.summary}"
            if results.classes:
                message += f"; {told_of(results.classes)}"
            figures = {
                "final/resolution_angstrom": cones.angstrom,
                "final/worst_cone_angstrom": cones.worst_angstrom,
                "final/worst_cone_ratio": cones.worst_ratio,
                "final/cone_area_ratio": cones.area_ratio,
            } | figures_of(results.classes)
        self._done = True
        self._learned.posed, self._learned.identity = self._found, self._pass
        return PassReport(message, self._images, checkpoint=False, figures=figures)

    def pause(self) -> Pause:
        """Poses lie in parts, and are inserted again: sums at the full box may be too large for a notice of 30 s."""
        self._found.flush()
        return Pause()

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """As `request`."""
        return self.request()

    def done(self) -> bool:
        """Whether the pass was made."""
        return self._done

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is found lies in parts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def _final_poses(self) -> FinalPoses:
        learned, context = self._learned, self._context
        if learned.model is not None:
            return ModelPoses(context, learned.model)
        if learned.references is None:
            raise CheckpointError(f"{context.run.url} holds no checkpoint: train it first")
        remembered = learned.particles if self._remember else None
        return ReferencePoses(
            context, learned.references, remembered, learned.encoder, learned.shift_radius,
            labels_stay=learned.labels_stay,
        )  # fmt: skip

    def _classes(self) -> int:
        return 1 if self._learned.references is None else self._learned.references.classes

    def _uncertain(self) -> tuple[str, ...]:
        """A note where most poses are uncertain; a model's poses have no probability."""
        found, _ = self._found.all()
        share = float((found.confidence * found.particle_probability).mean())
        if self._learned.references is None or share >= UNCERTAIN:
            return ()
        return (
            f"most poses are uncertain: a particle is shown in the pose given for it with a probability of {share:.0%} "
            "on average (rlnMaxValueProbDistribution); the map can be right where single poses are not",
        )

    def _write(self, solved: Float[Tensor, "classes 2 n n n"], notes: tuple[str, ...]) -> FinalResults:
        context, model = self._context, self._learned.model
        level, radius = solved.shape[-1], solved.shape[-1] / 2 - 1
        noise = torch.ones(level // 2 + 1, device=context.device)
        assert self._poses is not None, "request() comes first"
        told, self._poses = self._poses.notes, None  # so are references
        maps = ReferenceSet.of_maps(
            solved, context.store.pixel_size, noise=noise, radius=radius, solvent=context.solvent
        )
        found, half = self._found.all()
        maps, found = _largest_first(maps, found)
        notes = context.partition.notes + self._learned.notes + told + notes
        particles = FinalParticles(found, half, self._examples, notes, self._learned.signal)
        learned_map = None if model is None else model.volume.density()
        return write_results(context.config, context.store, self._out, particles, maps, learned_map)


def _largest_first(maps: ReferenceSet, found: PoseEstimates) -> tuple[ReferenceSet, PoseEstimates]:
    """Classes in the order of how many particles they hold."""
    if maps.classes == 1:
        return maps, found
    order = torch.bincount(found.class_index, minlength=maps.classes).argsort(descending=True, stable=True)
    return maps.select(order.to(maps.maps.device)), replace(found, class_index=order.argsort()[found.class_index])


def _weighted(images: ParticleImages) -> CtfWeightedImages:
    """Full images times their CTF."""
    if images.optics is not None and images.real is not None:
        real: Tensor = images.real
        return ctf_weighted_on_padded_box(real, images.optics, images.pixel_size, images.pixels)
    return ctf_weighted(images.transforms, images.ctf)
