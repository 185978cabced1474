"""A strain of a map and its poses together, against closed forms: it explains every image as before."""

import math

import torch

from scalecryo.evaluate.align_maps import linear_map
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction
from scalecryo.physics.rotation import random_rotations, rotation_from_vector
from scalecryo.pose.strain import StrainFit, StrainSteps, strained_poses

BOX = 32


def strain(z: float, xy: float = 0.0) -> torch.Tensor:
    """Along z, and a shear of x and y; without trace."""
    matrix = torch.diag(torch.tensor([-z / 2, -z / 2, z], dtype=torch.float64))
    matrix[0, 1] = matrix[1, 0] = xy
    return matrix


def gaussian(inverse: torch.Tensor) -> torch.Tensor:
    """exp(−|A⁻¹ x|² / 2σ²) with three lobes, on the grid of a map: V(A⁻¹ x) in closed form."""
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    place = torch.stack([x, y, z], -1) @ inverse.mT
    lobes = torch.tensor([[4.0, 0, 0], [0, -5.0, 3.0], [-3.0, 2.0, -5.0]], dtype=torch.float64)
    squared = (place[..., None, :] - lobes).square().sum(-1)
    return torch.exp(-squared / (2 * 2.0**2)).sum(-1).float()


def test_map_is_strained_as_its_closed_form() -> None:
    inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + strain(0.2, 0.05))
    found, wanted = linear_map(gaussian(torch.eye(3, dtype=torch.float64)), inverse.float()), gaussian(inverse)
    # Trilinear interpolation of a transform that is padded twice: 1 % of the peak. Volumes change by det A.
    scale = float((found * wanted).sum() / found.square().sum())
    assert abs(scale * float(torch.linalg.det(inverse)) - 1) < 0.01
    assert float((scale * found - wanted).abs().max()) < 0.02 * float(wanted.max())


def test_fit_recovers_a_strain_from_turned_poses() -> None:
    # All poses turned together by 2° as well, which is no strain; 1 % of the particles jumped anywhere.
    generator = torch.Generator().manual_seed(0)
    before, half = random_rotations(4000, generator), 1 + torch.arange(4000) % 2
    wanted = torch.stack([strain(0.01, 0.004), strain(-0.008)])
    together = rotation_from_vector(torch.tensor([0.0, 0.035, 0.0]))
    after = torch.empty_like(before)
    for number in (0, 1):
        after[half == number + 1] = together @ strained_poses(before[half == number + 1], wanted[number])
    after[::100] = random_rotations(40, generator)
    fit = StrainFit(torch.device("cpu"))
    fit.add(before, after, torch.ones(4000, dtype=torch.bool), half)
    # Second order: the product of a strain of 0.01 and a turn of 0.035.
    assert torch.allclose(fit.strain(), wanted, atol=7e-4)


def test_fit_of_noise_is_no_strain() -> None:
    generator = torch.Generator().manual_seed(1)
    before, half = random_rotations(1000, generator), 1 + torch.arange(1000) % 2
    noise = rotation_from_vector(0.02 * torch.randn(1000, 3, generator=generator))
    fit = StrainFit(torch.device("cpu"))
    fit.add(before, noise @ before, torch.ones(1000, dtype=torch.bool), half)
    assert not fit.strain().any()


def test_views_that_lie_near_one_axis_spread_as_the_map_is_stretched() -> None:
    # A map stretched by s along z shows at tilt atan(tan(t) / s) what the first showed at tilt t.
    tilt = torch.deg2rad(torch.tensor([5.0, 20.0, 40.0]))
    rotation = rotation_from_vector(torch.stack([torch.zeros(3), tilt, torch.zeros(3)], -1))
    stretched = torch.diag(torch.tensor([0.0, 0.0, 0.3]))
    found = strained_poses(rotation, stretched)
    assert torch.allclose(torch.arccos(found[:, 2, 2]), torch.atan(tilt.tan() / 1.3), atol=1e-5)
    assert torch.allclose(found.mT @ found, torch.eye(3).expand(3, 3, 3), atol=1e-5)


def test_strained_map_gives_the_same_images_at_strained_poses() -> None:
    # Along the plane of a slice the strain shows as a stretch of the image; across it not at all: views along z.
    plain, stretched = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([0.0, 0.0, 0.2], dtype=torch.float64))
    first, second = gaussian(plain), gaussian(torch.linalg.inv(plain + stretched))
    pixels, rotation = fourier_pixels(BOX, 10.0), torch.eye(3)[None]
    images = []
    for volume, pose in ((first, rotation), (second, strained_poses(rotation, stretched))):
        transform = rfft3_centred(volume * gridding_correction(BOX, 2.0), 2 * BOX)
        images.append(extract_slices(transform, pose, pixels.kx, pixels.ky, 2.0)[0])
    # A projection along z of a map stretched by 1.2 along z is 1.2 times the first one.
    assert float((images[1] / 1.2 - images[0]).abs().max()) < 0.02 * float(images[0].abs().max())


def test_steps_find_where_a_creep_ends() -> None:
    # Each iteration closes 3 % of the gap along one axis and 20 % along the others, and settles for one after a step.
    end = strain(0.3, 0.05).expand(2, 3, 3)
    state, steps = torch.zeros(2, 3, 3, dtype=torch.float64), StrainSteps()
    rate = torch.tensor([[0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [0.2, 0.2, 0.03]], dtype=torch.float64)
    for _ in range(14):
        velocity = rate * (end - state)
        velocity -= velocity.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(3)
        state = state + velocity + steps.follow(velocity)
    left = float((end - state)[:, 2, 2].abs().max())
    assert left < 0.1 * 0.3 * math.pow(0.97, 14)  # a tenth of what would be left


def test_a_creep_that_grows_is_not_turned_back() -> None:
    # Broyden's secant through two velocities of which the second is larger would point away from the end.
    steps, velocity = StrainSteps(), torch.stack([strain(0.01), strain(0.01)])
    assert not steps.follow(velocity).any()
    step = steps.follow(1.1 * velocity)
    assert float((step * velocity[0]).sum()) > 0
    assert torch.allclose(step, step.abs().amax() / velocity.abs().amax() * velocity[0], atol=1e-9)


def test_what_two_iterations_move_by_themselves_tells_nothing_of_the_end() -> None:
    # As measured (units of 1e-4): a change of that size is noise, and its secant asked for eight times this step.
    steps = StrainSteps()
    first, second = (strain(1e-4 * z, 1e-4 * xy).expand(2, 3, 3) for z, xy in ((-21.0, 24.0), (-12.0, 41.0)))
    assert not steps.follow(first).any()
    assert torch.allclose(steps.follow(second), 8.0 * second[0], atol=1e-9)


def test_halves_that_strain_in_opposite_ways_are_left_alone() -> None:
    steps, velocity = StrainSteps(), torch.stack([strain(0.01), strain(-0.01)])
    for _ in range(4):
        assert not steps.follow(velocity).any()
