"""Views that most particles share count less in a map while its poses still creep.

Where most views lie near one axis, their central slices outnumber the others also where they cross: there the map is
theirs, strain and all (see strain.py), and the few others pull it straight as weakly as they are few. With 85 % of the
views within 25° of an axis that is 4 % of the gap in an iteration. Weights that fall with the density of views let all
directions pull alike, which closes 20 to 40 %, at the price of noise: so they end with the creep. Views that are
uniform but for chance keep weights of exactly 1.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.evaluate.cones import cone_directions
from scalecryo.physics.symmetry import PointGroup

DIRECTIONS = 400  # on the half sphere, 7° apart: a view and its opposite are the same central slice
SHARPNESS = 30.0  # of the kernel exp(-SHARPNESS sin²): half of its height 9° off
CROWDED = 1.5  # times the mean density, above which views count less,
CHANCE = 4.0  # if that is more standard errors above it than chance brings in the most crowded of all directions
POWER = 1.5  # of density over weight: the views' poses are strained as well, and look less dense than they are


def _kernel(cosine: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    kernel = torch.exp(SHARPNESS * (cosine.square() - 1))
    return kernel / kernel.sum(1, keepdim=True)


class ViewCounts:
    """How many particles of each class are seen along each direction.

    Attributes:
        counts: of each class and direction; sums over particles, so those of several workers add.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.directions = cone_directions(DIRECTIONS).to(device, torch.float32)
        self.counts = torch.zeros(classes, DIRECTIONS, device=device)

    def add(
        self, rotation: Float[Tensor, "b 3 3"], class_index: Int[Tensor, " b"], number: Float[Tensor, " b"]
    ) -> None:
        """Count poses, each as so many particles."""
        nearest = (rotation[:, :, 2] @ self.directions.T).abs().argmax(1)
        self.counts.view(-1).index_add_(0, class_index * DIRECTIONS + nearest, number.to(self.counts))


def view_density(counts: Float[Tensor, "k d"], group: PointGroup | None = None) -> Float[Tensor, "k d"]:
    """Of the views of each class, smoothed, over its mean; 1 where a class has none.

    Args:
        counts: of particles along the directions of `ViewCounts`.
        group: whose rotations show each particle from other sides as well.
    """
    directions = cone_directions(DIRECTIONS).to(counts)
    smooth = _kernel(directions @ directions.T)
    if group is not None:
        turned = (_kernel(directions @ (one.to(counts) @ directions.T)) for one in group.others)
        smooth = (smooth + sum(turned)) / len(group)
    density = counts @ smooth.T
    mean = density.mean(1, keepdim=True)
    return torch.where(mean > 0, density / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)


class ViewWeights:
    """Weights of poses by how crowded their views are.

    Attributes:
        weight: of each class and direction, at most 1.
    """

    def __init__(self, relative: Float[Tensor, "k d"]) -> None:
        """
        Args:
            relative: density over that above which views are crowded.
        """
        self.directions = cone_directions(DIRECTIONS).to(relative)
        self.weight = relative.clamp_min(1).pow(-POWER)

    @classmethod
    def of(cls, counts: Float[Tensor, "k d"], group: PointGroup | None = None) -> "ViewWeights | None":
        """For particles that are seen so; None where no direction is crowded. Host sync."""
        error = (SHARPNESS / counts.sum(1, keepdim=True).clamp_min(1)).sqrt()  # of a smoothed density: it holds N / 30
        relative = view_density(counts, group) / (CHANCE * error + 1).clamp_min(CROWDED)
        return cls(relative) if bool((relative > 1).any()) else None

    def __call__(self, rotation: Float[Tensor, "b 3 3"], class_index: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of each pose."""
        near = _kernel(rotation[:, :, 2] @ self.directions.T)
        return (near * self.weight[class_index]).sum(1)
