"""Training of the latent encoder: from images whose coordinates the exact E-step gave, and from images that the model
makes.

Half of each batch are real images at their poses; half are projections of the model at random poses, with coordinates
and CTFs of other images of the batch and the estimated noise. The loss is the negative log-likelihood of a normal
distribution; where the exact posterior is known, coordinates are drawn from it, so that what the encoder says of its
spread holds for the true coordinates.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.data.io import urls
from scalecryo.distributed.gradients import replicated
from scalecryo.distributed.world import World
from scalecryo.model.latent_encoder import LatentEncoder, posed_image
from scalecryo.physics.rotation import random_rotations
from scalecryo.runs.folder import RunFolder
from scalecryo.settings import ReduceDtype
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.posed_images import PosedImages

RADIUS, HIDDEN = 12, 384  # Fourier pixels that are read; units of a layer
RATE = 2e-3  # of Adam, falling to nothing along a cosine
LEAST_LOG_SD = -4.0
FILE = "components/encoder.npz"


@dataclass(frozen=True, eq=False)
class Examples:
    """Images with coordinates to learn from.

    Attributes:
        posed: at their poses.
        z: mean of the coordinates.
        sd: their standard deviations; 0 where they are known.
    """

    posed: PosedImages
    z: Float[Tensor, "b q"]
    sd: Float[Tensor, "b q"]


class LatentTrainer:
    """The encoder and its optimiser."""

    def __init__(self, encoder: LatentEncoder, steps: int, world: World, reduce_dtype: ReduceDtype, seed: int) -> None:
        self.encoder = encoder
        self._replica: nn.Module = encoder if world.size == 1 else replicated(encoder, reduce_dtype)
        self._optimiser = torch.optim.Adam(encoder.parameters(), lr=RATE)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, steps)
        self._generator = torch.Generator().manual_seed(seed + world.rank)

    def train_step(self, model: ComponentModel, examples: Examples) -> Tensor:
        """One step on real images and as many that the model makes; returns the loss. Collective."""
        made = self.simulated(model, examples)
        parts = [_read(one.posed, model, self.encoder.radius) for one in (examples, made)]
        image, direction = (torch.cat(pair) for pair in zip(*parts, strict=True))
        mean, log_sd = self._replica(image, direction)
        noise = torch.randn(mean.shape, generator=self._generator).to(mean)
        drawn = torch.cat([examples.z, made.z]) + torch.cat([examples.sd, made.sd]) * noise
        log_sd = log_sd.clamp_min(LEAST_LOG_SD)
        weight = torch.cat([examples.posed.weight, torch.ones_like(made.posed.weight)])
        each = (0.5 * ((drawn - mean) * torch.exp(-log_sd)).square() + log_sd).sum(1)
        loss: Tensor = (weight @ each) / weight.sum().clamp_min(1e-6)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()
        self._schedule.step()
        return loss.detach()

    @torch.no_grad()
    def simulated(self, model: ComponentModel, examples: Examples) -> Examples:
        """Images of the model: at random poses, with other images' coordinates, and noise."""
        posed, count = examples.posed, len(examples.z)
        device = examples.z.device
        order = torch.randperm(count, generator=self._generator).to(device)
        rotation = random_rotations(count, self._generator).to(posed.rotation)
        sd = torch.randn(examples.z.shape, generator=self._generator).to(device) * examples.sd
        z = (examples.z + sd)[order]
        turned = replace(posed, poses=replace(posed.poses, rotation=rotation))
        _, predicted = model.residual(turned)
        image = predicted + (z.to(predicted)[:, None] @ model.slices(turned, "joint"))[:, 0]
        parts = (torch.randn(image.shape, generator=self._generator).to(device) for _ in range(2))
        sigma = (model.variance[posed.images.pixels.shell] / 2).sqrt()
        return Examples(replace(turned, centred=image + sigma * torch.complex(*parts)), z, torch.zeros_like(z))


def _read(
    posed: PosedImages, model: ComponentModel, radius: int
) -> tuple[Float[Tensor, "b s s"], Float[Tensor, "b 3"]]:
    return posed_image(posed.centred, posed.ctf, model.pixel_weight, posed.rotation, posed.images.pixels, radius)


@torch.no_grad()
def encoded(
    encoder: LatentEncoder, posed: PosedImages, model: ComponentModel
) -> tuple[Float[Tensor, "b q"], Float[Tensor, "b q"]]:
    """Coordinates of images at their poses and their standard deviations: one forward pass, and no map.

    Of the model only the noise is used.
    """
    mean, log_sd = encoder(*_read(posed, model, encoder.radius))
    return mean, log_sd.clamp_min(LEAST_LOG_SD).exp()


def save_encoder(run: RunFolder, encoder: LatentEncoder) -> None:
    """Into the run's folder."""
    held = {name: value.cpu().numpy() for name, value in encoder.state_dict().items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, sizes=np.array([encoder.radius, encoder.components, encoder.hidden]), **held)
    run.write(FILE, buffer.getvalue())


def load_encoder(run: RunFolder, device: torch.device) -> LatentEncoder | None:
    """From a run's folder; None where it has none."""
    if not urls.exists(run.path(FILE)):
        return None
    with np.load(io.BytesIO(urls.read_bytes(run.path(FILE))), allow_pickle=False) as held:
        radius, components, hidden = held["sizes"].tolist()
        state = {name: torch.from_numpy(held[name]) for name in held.files if name != "sizes"}
    encoder = LatentEncoder(radius, components, hidden)
    encoder.load_state_dict(state)
    return encoder.to(device)


def agreement(
    sums: Float[Tensor, "6 q"],
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Correlation of two sets of coordinates, and the root mean square of their difference over the second's spread.

    Args:
        sums: of weights, a, b, a², b² and a b.
    """
    weight, first, second, first_squared, second_squared, both = sums
    mean_a, mean_b = first / weight, second / weight
    var_a = (first_squared / weight - mean_a.square()).clamp_min(1e-30)
    var_b = (second_squared / weight - mean_b.square()).clamp_min(1e-30)
    together = both / weight - mean_a * mean_b
    difference = (first_squared - 2 * both + second_squared) / weight
    return together / (var_a * var_b).sqrt(), (difference / var_b).clamp_min(0).sqrt()


def moments(weight: Float[Tensor, " b"], a: Float[Tensor, "b q"], b: Float[Tensor, "b q"]) -> Float[Tensor, "6 q"]:
    """What `agreement` is made of, of a batch."""
    a, b, w = a.double(), b.double(), weight.double()
    return torch.stack([w @ torch.ones_like(a), w @ a, w @ b, w @ a.square(), w @ b.square(), w @ (a * b)])
