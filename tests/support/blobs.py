"""A simple density without symmetry."""

import torch
from torch import Tensor


def blobs(box_size: int, seed: int, count: int = 12) -> Tensor:
    """A map of Gaussian blobs of 1.5 px standard deviation, its centre of mass at the box centre."""
    centres = torch.randn((count, 3), generator=torch.Generator().manual_seed(seed)) * box_size / 8
    line = torch.arange(box_size) - box_size // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(box_size, box_size, box_size)
    for centre in centres - centres.mean(0):
        squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume += torch.exp(-squared / (2 * 1.5**2))
    return volume
