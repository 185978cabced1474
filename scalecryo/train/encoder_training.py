"""Teaching the encoder while the ladder climbs: from what the search found, and from projections of the map.

Half of each lesson are real images with the poses that the last local refinement gave them, turned in the plane by a
multiple of 90° (exact on Fourier pixels, astigmatism included); half are projections of the present map at random
poses, with the batch's CTFs and the estimated noise. The loss is the cross-entropy with soft labels, the shift's
squared error, and the paper's reconstruction loss through the encoder's own pose.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.config import ReduceDtype
from scalecryo.distributed.gradients import replicated
from scalecryo.distributed.world import World
from scalecryo.model.grid_encoder import GridEncoder, GridPrediction, encoder_features
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.fourier_slice import extract_slices
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.estimator import Reference, Refined
from scalecryo.pose.modes import soft_labels
from scalecryo.pose.search import templates

LABEL_WIDTH_DEG, LABEL_NEAREST = 9.0, 16
RECONSTRUCTION_SHARE = 0.1


@dataclass(frozen=True)
class TrainingBatch:
    """Images with poses to learn from, at the encoder's level and radius."""

    images: Tensor
    ctf: Tensor | None
    rotation: Float[Tensor, "b 3 3"]
    shift_px: Float[Tensor, "b 2"]


def training_batch(
    taken: list[tuple[ParticleImages, Refined]], level: int, pixels: FourierPixels, size: int, number: int
) -> TrainingBatch:
    """The `number`-th `size` particles of what an iteration took from a batch, at the encoder's level.

    The transforms of two levels differ by the ratio of the boxes (levels keep the noise), and both are packed by
    rising radius: the encoder's pixels are the first ones of the iteration's.
    """
    factor = pixels.box_size / level
    count = len(pixels)
    images = torch.cat([own.images[:, :count] for own, _ in taken]) * factor
    ctf = (
        torch.cat([own.ctf[:, :count] for own, _ in taken if own.ctf is not None])
        if taken[0][0].ctf is not None
        else None
    )
    rotation = torch.cat([refined.rotation for _, refined in taken])
    shift = torch.cat([refined.shift_px for _, refined in taken]) * factor
    # The halves lie one behind the other: stride through both.
    at = torch.arange(number, len(rotation), max(1, len(rotation) // size), device=rotation.device)[:size]
    return TrainingBatch(images[at], None if ctf is None else ctf[at], rotation[at], shift[at])


class EncoderTrainer:
    """The encoder, its optimiser and its lessons."""

    def __init__(
        self,
        encoder: GridEncoder,
        pixels: FourierPixels,
        *,
        rate: float,
        shift_sigma_px: float,
        world: World,
        reduce_dtype: ReduceDtype,
        seed: int,
    ) -> None:
        self.encoder = encoder
        self.pixels = pixels
        self._shift_sigma = shift_sigma_px
        self._quarter_turn = pixels.quarter_turn()
        self._replica: nn.Module = encoder
        if world.size > 1:
            self._replica = replicated(encoder, reduce_dtype)
        self._optimiser = torch.optim.Adam(encoder.parameters(), lr=rate, fused=True)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self, iteration: int) -> None:
        """Draw an iteration's augmentations from a seed of its own: a resumed worker draws the same."""
        self._generator.manual_seed(self._seed + 1_000_003 * iteration)

    def teach(self, lesson: TrainingBatch, reference: Reference) -> Tensor:
        """One step of the optimiser on real images and as many projections; returns the loss. Collective."""
        real, simulated = self._turned(lesson), self._simulated(lesson, reference)
        weight = reference.noise.pixel_weight(self.pixels)
        images = torch.cat([real.images, simulated.images])
        ctf = None if real.ctf is None or simulated.ctf is None else torch.cat([real.ctf, simulated.ctf])
        rotation = torch.cat([real.rotation, simulated.rotation])
        shift = torch.cat([real.shift_px, simulated.shift_px])
        prediction: GridPrediction = self._replica(encoder_features(images, ctf, weight))
        truth = PoseCandidates(rotation[:, None], shift[:, None], torch.zeros_like(shift[:, :1]))
        index, share = soft_labels(truth, self.encoder.grid, width_deg=LABEL_WIDTH_DEG, nearest=LABEL_NEAREST)
        loss = -(prediction.logits.log_softmax(1).gather(1, index) * share).sum(1).mean()
        scale = max(self._shift_sigma, 0.1)
        loss = loss + ((prediction.shift_px - shift) / scale).square().mean()
        loss = loss + RECONSTRUCTION_SHARE * self._reconstruction(prediction, images, ctf, shift, weight, reference)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"encoder": self.encoder.state_dict(), "optimiser": self._optimiser.state_dict(),
                "generator": self._generator.get_state()}  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.encoder.load_state_dict(state["encoder"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])

    def _reconstruction(
        self,
        prediction: GridPrediction,
        images: Tensor,
        ctf: Tensor | None,
        shift: Tensor,
        weight: Tensor,
        reference: Reference,
    ) -> Tensor:
        """Mean squared residual, in units of the noise, of the images predicted at the encoder's own rotations."""
        rotation = self.encoder.own_rotation(prediction)
        pixels = self.pixels
        slices = extract_slices(reference.transform, rotation, pixels.kx, pixels.ky, reference.scale)
        residual = images - form_images(slices, ctf, shift, pixels.kx, pixels.ky, pixels.box_size)
        return ((residual.real.square() + residual.imag.square()) * weight).sum(1).mean() / weight.count_nonzero()

    def _turned(self, lesson: TrainingBatch) -> TrainingBatch:
        """The real images, each turned in its plane by a multiple of 90°; the pose becomes R Rz(angle)ᵀ."""
        turns = torch.randint(4, (len(lesson.rotation),), generator=self._generator).to(lesson.rotation.device)
        source, friedel = self._quarter_turn
        quarter = lesson.rotation.new_tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        images, ctf, rotation, shift = lesson.images, lesson.ctf, lesson.rotation, lesson.shift_px
        for number in range(1, 4):
            more = turns >= number
            read = images[:, source]
            images = torch.where(more[:, None], torch.where(friedel, read.conj(), read), images)
            ctf = None if ctf is None else torch.where(more[:, None], ctf[:, source], ctf)
            rotation = torch.where(more[:, None, None], rotation @ quarter.T, rotation)
            shift = torch.where(more[:, None], shift @ quarter[:2, :2].T, shift)
        return TrainingBatch(images, ctf, rotation, shift)

    def _simulated(self, lesson: TrainingBatch, reference: Reference) -> TrainingBatch:
        """Projections of the map at random poses with the lesson's CTFs and the estimated noise."""
        count, pixels, device = len(lesson.rotation), self.pixels, lesson.rotation.device
        rotation = random_rotations(count, self._generator).to(device)
        shift = (torch.randn((count, 2), generator=self._generator) * self._shift_sigma).to(device)
        images = templates(reference.transform, rotation, pixels, reference.scale)
        images = form_images(images, lesson.ctf, shift, pixels.kx, pixels.ky, pixels.box_size)
        sigma = (reference.noise.variance()[pixels.shell] / 2).sqrt()
        noise = torch.complex(*(torch.randn(images.shape, generator=self._generator).to(device) for _ in range(2)))
        return TrainingBatch(images + noise * sigma, lesson.ctf, rotation, shift)
