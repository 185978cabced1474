"""The paper's encoder: image → pose parameters, by convolutions and two fully connected layers.

Nashed et al. 2021 (cryoPoseNet), §3: three blocks of conv 3x3, conv 3x3, max-pool with 32, 64 and 128 filters,
then two layers of 512 units. Nothing in it mixes particles (no batch normalisation), so a batch split over
workers gives the same result as a whole one.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.physics.fft import fourier_crop_2d


class PoseEncoder(nn.Module):
    """Maps images to `heads` vectors of pose parameters each."""

    def __init__(
        self,
        input_box: int,
        channels: tuple[int, ...],
        hidden: int,
        heads: int,
        outputs: int,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.input_box = input_box
        self.heads = heads
        self.outputs = outputs
        self.precision = precision
        blocks: list[nn.Module] = []
        previous = 1
        for width in channels:
            blocks += [
                nn.Conv2d(previous, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            previous = width
        side = input_box // 2 ** len(channels)
        # The stubs do not know this keyword.
        self.convolutions = cast(Any, nn.Sequential(*blocks)).to(memory_format=torch.channels_last)
        self.perceptron = nn.Sequential(
            nn.Flatten(),
            nn.Linear(previous * side * side, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, heads * outputs),
        )

    def forward(self, images: Float[Tensor, "b n n"]) -> Float[Tensor, "b heads outputs"]:
        """Pose parameters of each head; images are cropped in Fourier space to the network's box first."""
        if images.shape[-1] != self.input_box:
            images = fourier_crop_2d(images, self.input_box)
        narrow = self.precision == torch.bfloat16
        with torch.autocast(images.device.type, dtype=torch.bfloat16) if narrow else nullcontext():
            features = self.convolutions(images[:, None].contiguous(memory_format=torch.channels_last))
        # In single precision: it takes no longer, and the pose would be rounded to a tenth of a degree.
        parameters = self.perceptron(features.float())
        return parameters.reshape(-1, self.heads, self.outputs)
