"""Training of the encoder during refinement: from the poses found, and from projections of the map.

Half of each batch are real images with the poses that the last local refinement gave them, turned in the plane by a
multiple of 90° (exact on Fourier pixels, astigmatism included); half are projections of the present map at random
poses, with the batch's CTFs and the estimated noise. The loss is the cross-entropy with soft labels, the shift's
squared error, and the paper's reconstruction loss through the encoder's own pose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from scalecryo.distributed.gradients import replicated
from scalecryo.distributed.world import World
from scalecryo.map.reference import Reference, ReferenceSet
from scalecryo.model.grid_encoder import GridEncoder, GridPrediction, encoder_features
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.fourier_slice import extract_slices
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.candidate_sources import CandidateSource, EncoderSource
from scalecryo.pose.modes import soft_labels
from scalecryo.pose.search import templates
from scalecryo.settings import ReduceDtype

LABEL_WIDTH_DEG, LABEL_NEAREST = 9.0, 16
RECONSTRUCTION_SHARE = 0.1
MODES = 6  # of the encoder, that are locally refined


@dataclass(frozen=True)
class TrainingBatch:
    """Images with poses to learn from, at the encoder's level and radius."""

    transforms: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None
    poses: Poses

    @classmethod
    def of(cls, images: ParticleImages, found: Poses, pixels: FourierPixels, size: int, number: int) -> "TrainingBatch":
        """The `number`-th `size` particles of a batch with the poses found, at the encoder's level.

        The transforms of two levels differ by the ratio of the boxes (levels keep the noise), and both are packed by
        rising radius: the encoder's pixels are the first ones of the images'.

        Args:
            images: of any level.
            found: their poses.
            pixels: that the encoder sees.
            size: particles that are taken.
            number: of the step: each takes others.
        """
        count = len(pixels)
        order = images.half.argsort(stable=True)  # strides through both halves
        first = min(number, len(images) - 1)  # a worker may have one image, however many steps are made
        at = order[torch.arange(first, len(images), max(1, len(images) // size), device=order.device)[:size]]
        transforms = images.transforms[at, :count] * (pixels.box_size / images.box_size)
        ctf = None if images.ctf is None else images.ctf[at, :count]
        return cls(transforms, ctf, Poses(found.rotation[at], found.shift[at]))


class PoseLearner(Protocol):
    """An encoder that learns from poses found elsewhere, and gives candidates for local refinement."""

    pixels: FourierPixels
    """That it reads, of its level."""

    def begin(self, iteration: int) -> None:
        """An iteration of the refinement begins."""

    def train_step(self, batch: TrainingBatch, reference: Reference) -> Tensor:
        """One step; returns the loss. Collective."""

    def source(self, references: ReferenceSet) -> CandidateSource:
        """Candidates of images."""

    def own_poses(self, images: ParticleImages, references: ReferenceSet) -> Poses:
        """Poses by the encoder alone: one forward pass and no map."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""


class EncoderTrainer:
    """The encoder and its optimiser."""

    def __init__(
        self,
        encoder: GridEncoder,
        pixels: FourierPixels,
        pixel_size: float,
        *,
        rate: float,
        shift_sigma_px: float,
        world: World,
        reduce_dtype: ReduceDtype,
        seed: int,
        group: PointGroup | None = None,
    ) -> None:
        self.encoder, self._group = encoder, group
        self.pixels = pixels
        self.pixel_size = pixel_size
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

    def train_step(self, batch: TrainingBatch, reference: Reference) -> Tensor:
        """One step of the optimiser on real images and as many projections; returns the loss. Collective."""
        real, simulated = self._turned(batch), self._simulated(batch, reference)
        weight = reference.noise.pixel_weight(self.pixels)
        images = torch.cat([real.transforms, simulated.transforms])
        ctf = None if real.ctf is None or simulated.ctf is None else torch.cat([real.ctf, simulated.ctf])
        rotation = torch.cat([real.poses.rotation, simulated.poses.rotation])
        shift = torch.cat([part.poses.shift_px(self.pixel_size) for part in (real, simulated)])
        if self._group is not None:  # one label for all poses that show the same
            rotation = self._group.folded(rotation)
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

    def source(self, references: ReferenceSet) -> EncoderSource:
        """Separated modes of its distribution."""
        noise = references.level_noise(self.pixels.box_size, self.pixels)
        return EncoderSource(self.encoder, self.pixels, self.pixel_size, noise, MODES, self._group)

    def own_poses(self, images: ParticleImages, references: ReferenceSet) -> Poses:
        """The mean of its distribution around the likeliest point."""
        prediction = self.source(references).predict(images)
        return Poses(self.encoder.own_rotation(prediction), prediction.shift_px * self.pixel_size)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"encoder": self.encoder.state_dict(), "optimiser": self._optimiser.state_dict(),
                "generator": self._generator.get_state()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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

    def _turned(self, batch: TrainingBatch) -> TrainingBatch:
        """The real images, each turned in its plane by a multiple of 90°; the pose becomes R Rz(angle)ᵀ."""
        rotation, shift, images, ctf = batch.poses.rotation, batch.poses.shift, batch.transforms, batch.ctf
        turns = torch.randint(4, (len(rotation),), generator=self._generator).to(rotation.device)
        source, friedel = self._quarter_turn
        quarter = rotation.new_tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        for number in range(1, 4):
            more = turns >= number
            read = images[:, source]
            images = torch.where(more[:, None], torch.where(friedel, read.conj(), read), images)
            ctf = None if ctf is None else torch.where(more[:, None], ctf[:, source], ctf)
            rotation = torch.where(more[:, None, None], rotation @ quarter.T, rotation)
            shift = torch.where(more[:, None], shift @ quarter[:2, :2].T, shift)
        return TrainingBatch(images, ctf, Poses(rotation, shift))

    def _simulated(self, batch: TrainingBatch, reference: Reference) -> TrainingBatch:
        """Projections of the map at random poses with the batch's CTFs and the estimated noise."""
        count, pixels, device = len(batch.poses), self.pixels, batch.transforms.device
        rotation = random_rotations(count, self._generator).to(device)
        shift_px = (torch.randn((count, 2), generator=self._generator) * self._shift_sigma).to(device)
        images = templates(reference.transform, rotation, pixels, reference.scale)
        images = form_images(images, batch.ctf, shift_px, pixels.kx, pixels.ky, pixels.box_size)
        sigma = (reference.noise.variance()[pixels.shell] / 2).sqrt()
        noise = torch.complex(*(torch.randn(images.shape, generator=self._generator).to(device) for _ in range(2)))
        return TrainingBatch(images + noise * sigma, batch.ctf, Poses(rotation, shift_px * self.pixel_size))
