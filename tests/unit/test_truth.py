"""The truth that a run is followed by: at every level the same particles, map and pseudo-symmetry."""

import pytest
import torch

from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.rotation import random_rotations
from scalecryo.runs import truth as module
from scalecryo.runs.truth import Truth

BOX, PIXEL_SIZE = 32, 2.0


def blobs() -> torch.Tensor:
    """Four Gaussians of σ 2 px without symmetry."""
    line = torch.arange(BOX) - BOX // 2.0
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    places = ((0, 0, 0), (6, 0, 0), (0, 5, 2), (-3, 1, -6))
    return torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 8) for a, b, c in places]).sum(0)


def test_symmetry_is_searched_once_and_only_when_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(module, "rotational_symmetry", lambda volume: searches.append(volume) or torch.eye(3)[None])
    rotation, volume = random_rotations(20, torch.Generator().manual_seed(1)), blobs()
    truth, rows = Truth(rotation, volume), torch.arange(5, 15)
    assert searches == []
    for level in (24, BOX):
        found = truth.compare(rows, rotation[rows], fourier_resize_3d(volume, level), PIXEL_SIZE * BOX / level)
        assert found["truth/rotation_error_median_deg"] < 0.05  # of single precision
        assert found["truth/fsc_mean"] > 0.99
        assert len(found["truth/fsc"]) == level // 2 + 1
    assert len(searches) == 1
