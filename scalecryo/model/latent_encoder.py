"""A network from an image and its pose to its coordinates in the linear model of variety: one forward pass, no map.

The image is brought to the centre, multiplied by its CTF, weighted by the noise, and turned in its plane until only the
direction of view is left of its pose. That direction opens and closes what is read of the image: the exact posterior
mean is a product of the image with slices that depend on the pose, and so a bilinear function of both.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from scalecryo.physics.fft import FourierPixels, irfft2_centred

SIDE, FINER = 2, 4  # samples across an image, and of what they are read from, per Fourier pixel of its radius
HARMONICS = 96  # features of a direction
SMOOTHNESS = 3.0  # standard deviation of their frequencies, rad of phase for a turn by one rad


class LatentEncoder(nn.Module):
    """Bilinear in image and features of the view, then two layers."""

    def __init__(self, radius: int, components: int, hidden: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.radius, self.components, self.hidden = radius, components, hidden
        self.register_buffer("frequencies", SMOOTHNESS * torch.randn(3, HARMONICS, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(HARMONICS, generator=generator))
        self.frequencies: Tensor
        self.phases: Tensor
        self.view = nn.Sequential(nn.Linear(HARMONICS + 3, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.image = nn.Linear((SIDE * radius) ** 2, hidden)
        self.after = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 2 * components))

    def forward(
        self, image: Float[Tensor, "b s s"], direction: Float[Tensor, "b 3"]
    ) -> tuple[Float[Tensor, "b q"], Float[Tensor, "b q"]]:
        """Mean and logarithm of the standard deviation of each coordinate."""
        waves = torch.cos(direction @ self.frequencies + self.phases) * math.sqrt(2)
        gate = self.view(torch.cat([waves, direction], 1))
        read = self.image(image.flatten(1))
        mean, spread = self.after(torch.cat([read * gate, gate], 1)).chunk(2, 1)
        return mean, spread


def posed_image(
    centred: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    pixel_weight: Float[Tensor, " p"],
    rotation: Float[Tensor, "b 3 3"],
    pixels: FourierPixels,
    radius: int,
) -> tuple[Float[Tensor, "b s s"], Float[Tensor, "b 3"]]:
    """What the encoder reads: the image turned so that its pose is that of its direction of view alone, and that.

    Args:
        centred: transforms with the shift undone, packed.
        ctf: contrast transfer.
        pixel_weight: Hermitian weight over the noise variance.
        rotation: image frame to volume frame; the direction of view is its third column.
        pixels: that the transforms are packed by.
        radius: Fourier pixels that are read.
    """
    near = pixels.prefix(radius)
    count, fine, side = len(near), FINER * radius, SIDE * radius
    root = (pixel_weight[:count] / near.weight.clamp_min(1)).sqrt()
    weighted = centred[:, :count] * ctf[:, :count] * root
    grid = weighted.new_zeros(len(weighted), fine, fine // 2 + 1)
    grid[:, near.ky.long() % fine, near.kx.long()] = weighted
    # So scaled, white noise and CTFs of a mean square of a half give images of a variance of one.
    image = irfft2_centred(grid, fine) * (fine / radius * math.sqrt(2 / math.pi) * fine)
    # Rz(rot) Ry(tilt) Rz(psi): the last column is the view, the last row holds −sin(tilt) cos(psi), sin(tilt) sin(psi).
    psi = torch.atan2(rotation[:, 2, 1], -rotation[:, 2, 0])
    cosine, sine = psi.cos(), psi.sin()
    line = (torch.arange(side, device=image.device) - side // 2) / (side / 2)
    y, x = torch.meshgrid(line, line, indexing="ij")
    # The image of the direction alone holds at Rz(psi) x what this one holds at x.
    where = torch.stack([cosine[:, None, None] * x + sine[:, None, None] * y,
                         cosine[:, None, None] * y - sine[:, None, None] * x], -1)  # fmt: skip
    # Samples of grid_sample lie at (2 i + 1) / n − 1.
    turned = torch.nn.functional.grid_sample(image[:, None], where + 1 / fine, mode="bicubic", align_corners=False)
    return turned[:, 0], rotation[:, :, 2]
