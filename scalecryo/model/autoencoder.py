"""Encoder and physics decoder in one forward pass: image → candidate poses → predicted image → loss."""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from scalecryo.config import Config
from scalecryo.errors import ConfigError
from scalecryo.model.encoder import PoseEncoder
from scalecryo.model.loss import residual_loss
from scalecryo.model.pose_source import ROTATION_PARAMETERS, EncoderPoses, KnownPoses, PoseTable
from scalecryo.model.volume import Volume
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.kernels.backend import Backend
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses


class AutoEncoderOutput(NamedTuple):
    """What a forward pass returns, all per particle.

    Attributes:
        loss: mean squared residual per pixel of the winning candidate.
        poses: its poses.
        predicted: its predicted image, packed Fourier pixels.
    """

    loss: Float[Tensor, " b"]
    poses: Poses
    predicted: Complex[Tensor, "b p"]


class AutoEncoder(nn.Module):
    """A pose source and the shared volume, compared with the images through the imaging model."""

    def __init__(self, pose_source: nn.Module, volume: Volume, backend: Backend | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.pose_source = pose_source
        self.volume = volume

    def predict(
        self, transform: Complex[Tensor, "d d h"], poses: Poses, images: ParticleImages
    ) -> Complex[Tensor, "b p"]:
        """Predicted images: central slice, CTF, shift (equation 1 of Nashed et al. 2021)."""
        pixels = images.pixels
        geometry = pixels.kx, pixels.ky, self.volume.scale, pixels.box_size
        shift_px = poses.shift_px(images.pixel_size)
        return fourier_slice(transform, poses.rotation, shift_px, images.ctf, *geometry, backend=self.backend)

    def forward(self, images: ParticleImages) -> AutoEncoderOutput:
        """Score every candidate without gradient, then the best one with it (winner takes all)."""
        pixels, observed = images.pixels, images.transforms
        candidates: PoseCandidates = self.pose_source(images)
        transform = self.volume()
        best = torch.zeros(len(observed), dtype=torch.long, device=observed.device)
        count = candidates.rotation.shape[1]
        if count > 1:
            with torch.no_grad():
                predicted = (
                    self.predict(transform, candidates.select(torch.full_like(best, number)), images)
                    for number in range(count)
                )
                scores = [residual_loss(observed, each, pixels.weight, pixels.box_size) for each in predicted]
                best = torch.stack(scores, 1).argmin(1)
        poses = candidates.select(best)
        predicted_best = self.predict(transform, poses, images)
        loss = residual_loss(observed, predicted_best, pixels.weight, pixels.box_size)
        return AutoEncoderOutput(loss, poses, predicted_best)


def build_autoencoder(config: Config, box_size: int, rows: int) -> AutoEncoder:
    """The model that a configuration names, for images of a box; its start depends on train.seed alone.

    Raises:
        ConfigError: the encoder's input box does not suit the image box or its pooling.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    pose = config.pose
    outputs = ROTATION_PARAMETERS[pose.parameterisation] + (0 if pose.centred else 2)
    volume = Volume(
        box_size,
        config.volume.padding,
        config.volume.gridding_correction,
        config.volume.initial_scale,
        generator,
    )
    source: nn.Module
    if pose.source == "known":
        source = KnownPoses()
    elif pose.source == "table":
        source = PoseTable(rows, pose.parameterisation, pose.centred, generator)
    else:
        encoder = _build_encoder(config, box_size, outputs)
        source = EncoderPoses(encoder, pose.parameterisation, centred=pose.centred, copies=config.copies)
    kernels = config.volume.kernels
    return AutoEncoder(source, volume, None if kernels == "auto" else kernels)


def encoder_box(config: Config, box_size: int) -> int:
    """Box of the images that the encoder sees, px, where the training box is `box_size`.

    Raises:
        ConfigError: it does not suit the training box or the encoder's pooling.
    """
    input_box, poolings = config.encoder.input_box or box_size, len(config.encoder.channels)
    if not 2**poolings <= input_box <= box_size:
        raise ConfigError(
            f"config: encoder.input_box = {input_box}: must lie between {2**poolings} px (for {poolings} poolings) and "
            f"the training box of {box_size} px"
        )
    return input_box


def _build_encoder(config: Config, box_size: int, outputs: int) -> PoseEncoder:
    settings = config.encoder
    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    # The layers draw their start from torch's global generator: fork it so that nothing else depends on it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return PoseEncoder(
            encoder_box(config, box_size), settings.channels, config.hidden, config.heads, outputs, precision
        )
