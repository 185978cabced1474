"""How crowded views are, against closed forms, and that views which count alike pull a strained map straight."""

import math

import pytest
import torch

from scalecryo.physics.rotation import random_rotations, rotation_from_vector
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.view_balance import CROWDED, POWER, ViewCounts, ViewWeights, view_density

CAP_DEG, SHARE = 25.0, 0.85


def preferred(count: int, axis: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> torch.Tensor:
    """Poses of which a share has views evenly within an angle of an axis, the others anywhere."""
    generator = torch.Generator().manual_seed(0)
    rotation = random_rotations(20 * count, generator)
    near = rotation[:, :, 2] @ torch.tensor(axis) > math.cos(math.radians(CAP_DEG))
    many = round(SHARE * count)
    return torch.cat([rotation[near][:many], rotation[: count - many]])


def counts_of(rotation: torch.Tensor) -> torch.Tensor:
    views = ViewCounts(1, torch.device("cpu"))
    views.add(rotation, torch.zeros(len(rotation), dtype=torch.long), torch.ones(len(rotation)))
    assert float(views.counts.sum()) == len(rotation)
    return views.counts


def along(tilt_deg: float) -> torch.Tensor:
    return rotation_from_vector(torch.tensor([[0.0, math.radians(tilt_deg), 0.0]]))


def test_density_of_a_cap_is_its_closed_form() -> None:
    # Views within 25° of an axis or of its opposite: a share 1 - cos 25° of the half sphere holds 85 % of them.
    inside = SHARE / (1 - math.cos(math.radians(CAP_DEG))) + 1 - SHARE
    counts, zero = counts_of(preferred(40_000)), torch.zeros(1, dtype=torch.long)
    weights, density = ViewWeights.of(counts), view_density(counts)[0]
    assert weights is not None
    for tilt, expected in ((0.0, inside), (180.0, inside), (60.0, 1 - SHARE), (90.0, 1 - SHARE)):
        near = int((along(tilt)[0, :, 2] @ weights.directions.T).abs().argmax())
        # Counting by the nearest direction (5°) and the kernel (9°) smooth the edge; 700 particles a kernel outside.
        assert float(density[near]) == pytest.approx(expected, rel=0.12)
        # The weight of a pose is a mean over the kernel once more, and a convex function of density.
        wanted = min(CROWDED / expected, 1.0) ** POWER
        assert float(weights(along(tilt), zero)) == pytest.approx(wanted, rel=0.2)


def test_uniform_views_weigh_exactly_alike() -> None:
    for seed in range(5):
        poses = random_rotations(1000, torch.Generator().manual_seed(seed))
        assert ViewWeights.of(counts_of(poses)) is None
    assert ViewWeights.of(torch.zeros(2, 400)) is None  # no particle yet


def test_counts_of_workers_add_and_classes_stay_apart() -> None:
    poses = preferred(2000)
    views = ViewCounts(2, torch.device("cpu"))
    of_class = (torch.arange(2000) % 2).long()
    views.add(poses, of_class, torch.ones(2000))
    first, second = counts_of(poses[of_class == 0]), counts_of(poses[of_class == 1])
    assert torch.equal(views.counts, torch.cat([first, second]))
    assert torch.equal(first + second, counts_of(poses))


def test_a_group_shows_each_view_along_all_of_its_axes() -> None:
    # Views about x alone; with D2's two-folds they stay about x, with C4's four-fold axis along z about y as well.
    counts = counts_of(preferred(20_000, (1.0, 0.0, 0.0)))
    plain, turned = (view_density(counts, group)[0] for group in (PointGroup.of("D2"), PointGroup.of("C4")))
    views = ViewCounts(1, torch.device("cpu")).directions
    at_x, at_y = int(views[:, 0].abs().argmax()), int(views[:, 1].abs().argmax())
    # The direction that is nearest to an axis is up to 5° off it, and the kernel smooths within the cap.
    assert float(plain[at_x]) == pytest.approx(SHARE / (1 - math.cos(math.radians(CAP_DEG))) + 1 - SHARE, rel=0.1)
    assert float(plain[at_y]) < 0.5
    assert float(turned[at_x]) == pytest.approx(0.5 * float(plain[at_x]), rel=0.1)
    assert float(turned[at_y]) == pytest.approx(float(turned[at_x]), rel=0.1)
