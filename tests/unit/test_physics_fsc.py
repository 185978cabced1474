"""Shapes, shells and bad input of the shell statistics."""

import pytest
import torch

from scalecryo.errors import InputError
from scalecryo.physics.fsc import fsc, power_spectrum, resolution, shell_index_3d, shell_mean


def test_shell_index():
    shell = shell_index_3d(8)
    assert shell.shape == (8, 8, 5)
    assert shell[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert shell[-1, 0, 0] == 1
    assert shell[4, 4, 4] == 7


def test_shell_mean_of_the_radius():
    shell = shell_index_3d(16)
    torch.testing.assert_close(shell_mean(shell.double()), torch.arange(9, dtype=torch.float64))


def test_curves_are_finite_for_empty_maps():
    zero = torch.zeros(8, 8, 8)
    assert fsc(zero, zero).tolist() == [0.0] * 5
    assert power_spectrum(zero).tolist() == [0.0] * 5


def test_resolution_is_plain_python():
    assert all(type(value) is float for value in resolution(torch.tensor([1.0, 0.9, 0.1]), 8, 2.0, 0.5))


@pytest.mark.usefixtures("wrong_shapes")
def test_unequal_boxes_are_refused():
    with pytest.raises(InputError, match="resize one"):
        fsc(torch.zeros(8, 8, 8), torch.zeros(6, 6, 6))
    with pytest.raises(InputError, match="even"):
        fsc(torch.zeros(7, 7, 7), torch.zeros(7, 7, 7))
