"""A network learns from the exact E-step to give coordinates in one forward pass; its error on images never seen."""

from dataclasses import replace

import numpy as np
import torch

from scalecryo.distributed.world import World
from scalecryo.model.latent_encoder import LatentEncoder
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.latent_training import (
    HIDDEN,
    RADIUS,
    Examples,
    LatentTrainer,
    agreement,
    encoded,
    moments,
    save_encoder,
)
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import ComponentStage, posed_parts
from scalecryo.train.stages.coordinates import pixels_of

BATCH = 256
STEPS = 400
HELD_OUT_SHARE, HELD_OUT_DRAW = 8, 1001  # one particle of so many is not learnt from; number of the draw
MOST_TESTED = 20_000  # particles that are read for those held out


class LatentEncoding(ComponentStage):
    """A pass that learns, and one over particles held out that says how well; none where no component passes."""

    name = "latent encoder"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: poses, components and coordinates; gets what the encoder is worth.
        """
        super().__init__(context, learned)
        self._trainer: LatentTrainer | None = None
        self._encoder: LatentEncoder | None = None
        self._images, self._done = 0, False

    def request(self) -> BatchRequest:
        """Some steps of shuffled batches; then batches to test with."""
        context, model = self._context, self._model
        level = min((one for one in context.levels if one / 2 - 1 >= RADIUS), default=max(context.levels))
        radius = min(RADIUS, level // 2 - 1, int(pixels_of(model, context).radius_limit))
        pixels, self._images = context.pixels(level, radius), 0
        model.begin(pixels)
        coordinates = self._learned.coordinates
        assert coordinates is not None, "they come first"
        if not coordinates.passing:  # no component passes: there is nothing to learn
            return BatchRequest((pixels,), BATCH, batches=0)
        order = context.order(level, BATCH)
        if self._encoder is not None:
            self._sums = torch.zeros(6, model.count, dtype=torch.float64, device=context.device)
            batches = min(order.steps_per_epoch, -(-MOST_TESTED // BATCH))
            return BatchRequest((pixels,), BATCH, batches=batches)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.config.train.seed)
            encoder = LatentEncoder(radius, model.count, HIDDEN).to(context.device)
        reduce = context.config.optim.reduce_dtype
        self._trainer = LatentTrainer(encoder, STEPS, context.world, reduce, context.config.train.seed)
        return BatchRequest((pixels,), BATCH, batches=STEPS, padding=True)

    def step(self, *images: ParticleImages) -> None:
        """One step of the optimiser, or of the test."""
        # Every worker takes every step, with nothing but padding too.
        padded = replace(images[0], rows=images[0].rows.clamp_min(0))
        for whole in posed_parts(padded, self._context, self._learned, 1):
            posed = replace(whole, weight=whole.weight * whole.images.weight)
            examples = self._examples(posed)
            held = self._context.partition.label(posed.images.rows, HELD_OUT_DRAW, HELD_OUT_SHARE) == 0
            self._images += len(held)
            if self._encoder is None:
                assert self._trainer is not None, "request() comes first"
                seen = replace(posed, weight=posed.weight * ~held)
                self._trainer.train_step(self._model, replace(examples, posed=seen))
            else:
                mean, _ = encoded(self._encoder, posed, self._model)
                self._sums += moments(posed.weight * held, mean, examples.z)

    def finish_pass(self, world: World) -> PassReport:
        """The encoder, or its error. Collective."""
        coordinates = self._learned.coordinates
        assert coordinates is not None, "they come first"
        if not coordinates.passing:
            self._done = True
            return PassReport("components: none for an encoder to learn", 0, checkpoint=False)
        if self._encoder is None:
            assert self._trainer is not None, "request() comes first"
            self._encoder, self._trainer = self._trainer.encoder, None
            return PassReport("components: the encoder has learnt", self._images, checkpoint=False)
        world.all_reduce_(self._sums)
        if world.is_leader:
            save_encoder(self._context.run, self._encoder)
        correlation, error = (part[: coordinates.passing].tolist() for part in agreement(self._sums))
        self._done = True
        self._learned.coordinates = replace(coordinates, encoder=(np.array(correlation), np.array(error)))
        told = " ".join(f"{value:.2f}" for value in correlation)
        wrong = " ".join(f"{value:.2f}" for value in error)
        message = (
            f"components: on particles that it has not learnt from, the encoder's coordinates correlate by {told} with "
            f"the exact ones, with an error of {wrong} of their spread"
        )
        figures = {f"latent_encoder/correlation_{k}": value for k, value in enumerate(correlation, 1)}
        figures |= {f"latent_encoder/error_{k}": value for k, value in enumerate(error, 1)}
        return PassReport(message, self._images, checkpoint=False, figures=figures)

    def done(self) -> bool:
        """Whether the encoder has learnt and was tested."""
        return self._done

    def _examples(self, posed: PosedImages) -> Examples:
        coordinates = self._learned.coordinates
        assert coordinates is not None, "they come first"
        rows = posed.images.rows.cpu().numpy()  # host sync
        z, sd = (torch.from_numpy(values[rows]).to(posed.weight) for values in (coordinates.z, coordinates.sd))
        return Examples(posed, z, sd)
