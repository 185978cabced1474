"""Every particle's place in the linear model of variety, what the model is worth on data never seen, and its states."""

import logging

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.mixture import Mixture, best_mixture
from scalecryo.map.components import nested_evidence, products
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.particle_coordinates import Coordinates, coordinate_table, note_coordinates
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import ComponentStage, posed_parts

logger = logging.getLogger(__name__)
BATCH = 256
MOST_STATES, MOST_POINTS = 20, 10_000  # of the mixture
SURE = 4.0  # standard errors of the gain on images never seen, above which a component is taken to be there
LEAST_GAIN = 0.01  # per image, of a component that is worth telling of, however many images there are
SIGNAL = 0.143
LEAST_WEIGHT = 0.3  # of a particle whose place the mixture learns from


def pixels_of(model: ComponentModel, context: RunContext) -> FourierPixels:
    """What a pass that places particles reads: the smallest level that the model's resolution fits into."""
    reach = min(model.resolution, max(context.levels) / 2 - 1)
    return context.pixels(min(level for level in context.levels if level / 2 - 1 >= reach), reach)


class CoordinatePass(ComponentStage):
    """One pass over all particles, each seen with the mean of both halves' components."""

    name = "coordinates"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: poses and components; gets the coordinates.
        """
        super().__init__(context, learned)
        self._images = 0

    def request(self) -> BatchRequest:
        """Every particle in order."""
        context, model = self._context, self._model
        self._pixels = pixels_of(model, context)
        model.begin(self._pixels)
        self._table = coordinate_table(context.run, context.store.count, model.count)
        self._table.begin(f"coordinates_{self._learned.identity[-12:]}")
        self._sums = torch.zeros(3, model.count, dtype=torch.float64, device=context.device)
        """Of the components: gain, its square, second moment."""
        self._counted = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._images = 0
        return BatchRequest((self._pixels,), BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """E-step alone."""
        model = self._model
        for posed in posed_parts(images[0], self._context, self._learned, model.count):
            residual, predicted = model.residual(posed)
            latents = model.expect_with(residual, predicted, model.slices(posed, "joint")).latents
            note_coordinates(self._table, posed.images.rows, latents)
            gain = self._held_out_gain(residual, predicted, model.slices(posed, "other"))
            weight = posed.weight.double()
            second = latents.second_moment.diagonal(dim1=1, dim2=2).double()
            self._sums += torch.stack([weight @ gain, weight @ gain.square(), weight @ second])
            self._counted += torch.stack([weight.sum(), weight.square().sum()])
            self._images += len(posed.images)

    def finish_pass(self, world: World) -> PassReport:
        """Which components are there, and which states. Collective."""
        world.all_reduce_(self._sums, self._counted)
        self._table.commit(world)
        gain, squared, moment = (self._sums / self._counted[0]).cpu().numpy()
        images = float(self._counted[0] ** 2 / self._counted[1])  # host sync
        error = np.sqrt(np.maximum(squared - gain**2, 0) / images)
        agreement = self._model.agreement
        assert agreement is not None, "the M-steps come first"
        confirmed = (gain > np.maximum(SURE * error, LEAST_GAIN)) & (agreement.cpu().numpy() > SIGNAL)
        passing = int(np.cumprod(confirmed).sum())
        mixture = self._mixture(world, passing) if passing else None
        self._learned.coordinates = Coordinates(self._table, gain, error, moment, passing, mixture)
        message = f"components: {passing} of {len(gain)} are confirmed by images never seen"
        if not passing:
            message = "components: no component passes: the particles show one structure, as far as these data tell"
        elif mixture is not None:
            message += f", {len(mixture)} states by BIC"
        return PassReport(message, self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether the pass was made."""
        return self._learned.coordinates is not None

    def _held_out_gain(self, residual: Tensor, predicted: Tensor, slices: Tensor) -> Float[Tensor, "b q"]:
        """Of each image, with components that were made without it; where the contrast varies, it is free."""
        model = self._model
        free = [] if model.spread == 0 else [model.spread * predicted[:, None]]
        gram, product = products(torch.cat([*free, slices], 1), residual, model.pixel_weight)
        return nested_evidence(gram, product, len(free))

    def _mixture(self, world: World, passing: int) -> Mixture:
        """States of the particles that show one; the same on every worker."""
        rows = torch.arange(self._context.store.count)
        posed = self._learned.posed
        assert posed is not None, "the final pass comes first"
        poses, _ = posed.all()
        good = (poses.particle_probability >= LEAST_WEIGHT).cpu() & (self._context.chosen(rows) > 0).cpu()
        at = good.nonzero()[:, 0].numpy()
        at = at[:: max(1, len(at) // MOST_POINTS)]
        points = self._table.columns()["z"][at][:, :passing].astype(np.float64)
        found = best_mixture(points, MOST_STATES, self._context.config.train.seed)
        if world.size == 1:
            return found
        # Machines round differently: worker 0's is everybody's.
        held = torch.zeros(MOST_STATES, 1 + passing + passing**2, dtype=torch.float64, device=self._context.device)
        if world.is_leader:
            parts = found.share[:, None], found.mean, found.covariance.reshape(len(found), -1)
            held[: len(found)] = torch.from_numpy(np.concatenate(parts, 1)).to(held)
        world.all_reduce_(held)
        share, mean, covariance = (
            part.numpy() for part in held[held[:, 0] > 0].cpu().split([1, passing, passing**2], 1)
        )
        covariance = covariance.reshape(-1, passing, passing)
        return Mixture(share[:, 0], mean, covariance, found.log_likelihood, found.bic)
