"""The shared, learnable map: real-space voxels, transformed once a step."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from scalecryo.physics.fft import rfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction, padded_box
from scalecryo.physics.mask import soft_sphere


class Volume(nn.Module):
    """Density on a cubic grid, protein bright, in the units of the normalised images.

    Starts uniformly random (Nashed et al. 2021, Algorithm 1). The voxels are a parameter of order one and
    `voxel_scale` brings them to density, so that one learning rate serves every box.
    """

    def __init__(
        self,
        box_size: int,
        padding: float,
        gridding: bool,
        initial_scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.box_size = box_size
        self.padded_box = padded_box(box_size, padding)
        self.voxel_scale = initial_scale / box_size
        self.voxels = nn.Parameter(torch.rand((box_size,) * 3, generator=generator))
        window = soft_sphere(box_size, box_size / 2 - 3, edge_px=3)
        weight = self.voxel_scale * window
        if gridding:
            weight = weight * gridding_correction(box_size, self.padded_box / box_size)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("transform_weight", weight, persistent=False)
        self.window: Tensor
        self.transform_weight: Tensor
        """From voxels to what is transformed: scale, window and gridding correction in one product."""

    @property
    def scale(self) -> float:
        """Samples of the sliced transform per cycle a box."""
        return self.padded_box / self.box_size

    def density(self) -> Float[Tensor, "n n n"]:
        """The map itself, inside the sphere that fits the box."""
        return self.voxels * self.voxel_scale * self.window

    def forward(self) -> Complex[Tensor, "d d h"]:
        """Padded transform of the density, corrected for trilinear interpolation."""
        return rfft3_centred(self.voxels * self.transform_weight, self.padded_box)
