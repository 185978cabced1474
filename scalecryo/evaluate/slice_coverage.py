"""How evenly central slices cover Fourier space, and what that leaves of the signal that even views would add up.

A voxel that n slices pass has noise of 1/n. Over a shell noises add, so that what counts is not the mean of n but its
harmonic mean: views that leave a direction almost bare cost more there than they bring elsewhere (Baldwin & Lyumkis
2020, sampling compensation factor).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.cones import cone_directions

DIRECTIONS = 800  # of the half sphere, 5° apart
HALF_WIDTH = 0.03  # of a slice, as a sine: one voxel at shell 33
FLOOR = 1e-3  # of the mean, what solving a map adds to the weight of each voxel
CHUNK = 4096  # views compared with all directions at a time


def slice_coverage(rotation: Float[Tensor, "n 3 3"], weight: Float[Tensor, " n"] | None = None) -> float:
    """Signal-to-noise ratio of a shell over that of as many slices spread evenly: 1 for even views, less for others.

    1 as well where there is no slice at all. Host sync.

    Args:
        rotation: of the images.
        weight: of each in the map; None: all alike.
    """
    directions = cone_directions(DIRECTIONS).to(rotation)
    weight = torch.ones_like(rotation[:, 0, 0]) if weight is None else weight.to(rotation)
    passing = directions.new_zeros(DIRECTIONS, dtype=torch.float64)
    for view, own in zip(rotation[:, :, 2].split(CHUNK), weight.split(CHUNK), strict=True):
        passing += ((directions @ view.T).abs() < HALF_WIDTH).to(own) @ own
    if not bool(passing.any()):
        return 1.0
    density = passing / (HALF_WIDTH * weight.sum(dtype=torch.float64))
    # A direction that no slice passes has neither noise nor signal.
    solved = density / (density + FLOOR)
    return float(solved.square().mean() / (solved / (density + FLOOR)).mean())
