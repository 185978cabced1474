"""What the images' power says of a map: closed forms, and half-maps of which some images lie at wrong poses."""

import pytest
import torch
from torch import Tensor

from scalecryo.map.image_signal import ImageSignal


def falling() -> ImageSignal:
    """Signal of 40/k² of the noise."""
    return ImageSignal(40 / torch.arange(64.0).clamp_min(1).square())


@pytest.mark.parametrize(("particles", "shell"), [(420, 20), (3_353, 40), (10**9, 44)])
def test_last_shell_is_where_right_poses_would_make_the_halves_agree(particles: int, shell: int) -> None:
    # Closed form: 6/π · N/(4k) · 40/k² is 1 at k = (60 N / π)^(1/3). Less than a fiftieth of the noise is not
    # believed in: from k = 2000^(1/2) = 44.7 on.
    assert falling().last_shell(particles) == shell


def curve(signal: ImageSignal, particles: int, right: float) -> Tensor:
    """FSC of half-maps of which a share of the images adds up, and the others' signal is lost."""
    ratio = signal.expected(particles) * right**2
    return ratio / (1 + ratio)


@pytest.mark.parametrize("right", [1.0, 0.7, 0.4])
def test_wrong_poses_take_their_share_squared(right: float) -> None:
    found = falling().coherent_share(curve(falling(), 6_401, right), 6_401)
    assert found == pytest.approx(right**2, rel=1e-4)


def test_nothing_is_said_where_images_hold_little() -> None:
    assert falling().coherent_share(torch.ones(65), 10) is None


def test_halves_that_agree_without_noise_have_no_infinite_share() -> None:
    assert falling().coherent_share(torch.ones(33), 6_401) == pytest.approx(
        999 / float(falling().expected(6_401)[24]), rel=0.2
    )
