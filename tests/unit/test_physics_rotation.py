"""Frames, hands and gradients of rotations."""

import pytest
import torch

from scalecryo.errors import InputError
from scalecryo.physics import rotation as rotations
from scalecryo.physics.so3_grid import so3_grid


def assert_rotations(matrices: torch.Tensor) -> None:
    eye = torch.eye(3, dtype=matrices.dtype).expand_as(matrices)
    torch.testing.assert_close(matrices @ matrices.mT, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(matrices.shape[:-2]), rtol=0, atol=1e-5)


def test_every_head_gives_rotations():
    numbers = 3 * torch.randn(2, 5, 6)
    assert_rotations(rotations.s2s2_to_rotation(numbers))
    assert_rotations(rotations.quaternion_to_rotation(numbers[..., :3]))
    assert_rotations(rotations.euler_head_to_rotation(numbers[..., :3]))
    assert_rotations(rotations.rotation_from_vector(numbers[..., :3]))
    assert_rotations(rotations.random_rotations(7, torch.Generator().manual_seed(0)))
    assert_rotations(so3_grid(100))


def test_psi_turns_the_image_in_its_plane():
    # rot = tilt = 0: a point on the volume's x axis appears at R^T r, turned by -psi.
    rotation = rotations.euler_to_rotation(torch.tensor([0.0, 0.0, 90.0]))
    torch.testing.assert_close(rotation.mT @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, -1, 0]), rtol=0, atol=1e-6)


def test_tilt_is_the_view_along_x():
    # tilt = 90: the beam, z of the image, is the volume's x axis.
    rotation = rotations.euler_to_rotation(torch.tensor([0.0, 90.0, 0.0]))
    torch.testing.assert_close(rotation @ torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]), rtol=0, atol=1e-6)


def test_euler_keeps_shape_and_precision():
    angles = torch.zeros(4, 2, 3, dtype=torch.float64)
    back = rotations.rotation_to_euler(rotations.euler_to_rotation(angles))
    assert back.shape == (4, 2, 3)
    assert back.dtype == torch.float64


def test_flip_hand_gives_the_mirrored_map_the_same_slice():
    rotation = rotations.random_rotations(5, torch.Generator().manual_seed(1))
    k = torch.tensor([2.0, -3.0, 0.0])
    mirror = torch.tensor([1.0, 1.0, -1.0])
    # F_mirrored(q) = F(mirror q): the same point of the map is sampled.
    torch.testing.assert_close(mirror * (rotations.flip_hand(rotation) @ k), rotation @ k)
    assert_rotations(rotations.flip_hand(rotation))


def test_random_rotations_repeat_with_the_seed():
    a, b = (rotations.random_rotations(3, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a, b)
    assert rotations.random_rotations(2, None, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("head", "numbers"),
    [
        (rotations.rotation_from_vector, torch.zeros(1, 3)),
        (rotations.quaternion_to_rotation, torch.zeros(1, 3)),
        (rotations.euler_head_to_rotation, torch.zeros(1, 3)),
        (rotations.s2s2_to_rotation, torch.tensor([[1.0, 0, 0, 0, 1, 0]])),
        (rotations.s2s2_to_rotation, torch.zeros(1, 6)),
    ],
)
def test_gradients_are_finite_at_special_points(head, numbers):
    numbers.requires_grad_()
    weight = torch.arange(9.0).reshape(3, 3)
    (gradient,) = torch.autograd.grad((head(numbers) * weight).sum(), numbers)
    assert bool(gradient.isfinite().all())


def test_gradient_of_the_exponential_at_zero_is_the_generator():
    jacobian = torch.autograd.functional.jacobian(rotations.rotation_from_vector, torch.zeros(3))
    generator_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(jacobian[..., 2], generator_z)


def test_grid_keeps_its_precision_and_refuses_to_be_empty():
    assert so3_grid(10, torch.float64).dtype == torch.float64
    with pytest.raises(InputError, match="at least 1"):
        so3_grid(0)
