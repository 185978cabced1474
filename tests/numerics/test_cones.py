"""Correlation by direction, against maps whose correlation in every direction is known."""

import csv
import io
import math

import numpy as np
import pytest
import torch

from scalecryo.evaluate.cones import HALF_ANGLE_DEG, ConicalFsc, cone_directions, cone_fsc
from scalecryo.evaluate.report import cones_figure
from scalecryo.physics.fft import irfft3_centred, rfft3_centred
from scalecryo.physics.fsc import fsc, resolution, shell_index_3d
from scalecryo.physics.mask import soft_sphere

BOX, PIXEL_SIZE = 64, 1.5


def white(seed: int) -> torch.Tensor:
    return torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def angle_deg(axis: torch.Tensor) -> torch.Tensor:
    """Angle of every coefficient to an axis through both its directions, from numpy's frequencies."""
    line, half = np.fft.fftfreq(BOX), np.fft.rfftfreq(BOX)
    kz, ky, kx = np.meshgrid(line, line, half, indexing="ij")
    along = np.abs(kx * float(axis[0]) + ky * float(axis[1]) + kz * float(axis[2]))
    length = np.maximum(np.sqrt(kx**2 + ky**2 + kz**2), 1e-12)
    return torch.from_numpy(np.rad2deg(np.arccos(np.clip(along / length, 0, 1))))


def without_cone(signal: torch.Tensor, axis: torch.Tensor, half_angle_deg: float) -> torch.Tensor:
    return irfft3_centred(rfft3_centred(signal) * (angle_deg(axis) > half_angle_deg), BOX)


def cones_of(first: torch.Tensor, second: torch.Tensor) -> ConicalFsc:
    directions = cone_directions()
    curves = cone_fsc(first, second, directions)
    _, angstrom = resolution(fsc(first, second), BOX, PIXEL_SIZE, 0.143)
    return ConicalFsc(directions, curves, BOX, PIXEL_SIZE, angstrom)


def falling(seed: int) -> torch.Tensor:
    """Signal whose power over that of white noise is 1/6 at shell 20, FSC 0.143, and falls."""
    amplitude = (1 / 6) ** 0.5 * torch.exp(3.0 * (1 - shell_index_3d(BOX) / 20))
    return irfft3_centred(rfft3_centred(white(seed)) * amplitude, BOX)


def test_directions_cover_the_half_sphere_evenly() -> None:
    directions = cone_directions()
    assert torch.allclose(directions.norm(dim=1), torch.ones(len(directions)).double())
    cosine = (directions @ directions.T).abs().fill_diagonal_(0)
    nearest = torch.rad2deg(torch.arccos(cosine.max(1).values))
    # 128 points of equal area are sqrt(2π/128) = 12.7° apart on a square net; less where the half sphere is closed.
    assert nearest.min() > 8
    assert nearest.max() < 16
    # Every line through the origin lies in some cone.
    lines = torch.nn.functional.normalize(torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).double())
    assert (lines @ directions.T).abs().max(1).values.min() > math.cos(math.radians(HALF_ANGLE_DEG))


def test_a_cone_of_ninety_degrees_is_the_whole_shell() -> None:
    first, second = falling(0) + white(1), falling(0) + white(2)
    curves = cone_fsc(first, second, cone_directions(4), half_angle_deg=90.0)
    assert torch.allclose(curves, fsc(first, second).expand_as(curves), atol=1e-9)


@pytest.mark.parametrize("axis", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.36, -0.48, 0.8)])
def test_a_cone_whose_signal_is_removed_correlates_by_nothing(axis: tuple[float, float, float]) -> None:
    # Signal and noise of equal power: FSC = 1/2 in every direction, 0 where the signal was taken away.
    removed = torch.tensor(axis).double()
    across = torch.linalg.cross(removed, torch.tensor([0.6, 0.8, 0.1]).double())
    direction = torch.stack([removed, across / across.norm()])
    signal = without_cone(white(0), removed, HALF_ANGLE_DEG)
    curves = cone_fsc(signal + white(1), signal + white(2), direction)[:, 8:31]
    # A cone holds (1 - cos 20°) 2πs² independent coefficients, 25 to 365 in shells 8 to 31: scatter 0.2 to 0.05.
    assert curves[0].mean().abs() < 0.04
    assert curves[1].mean() == pytest.approx(0.5, abs=0.04)


def test_the_worst_cone_is_the_one_without_signal() -> None:
    axis = torch.tensor([0.36, -0.48, 0.8]).double()
    kept = without_cone(falling(0), axis, 30.0) + irfft3_centred(
        rfft3_centred(falling(0)) * ((angle_deg(axis) <= 30.0) & (shell_index_3d(BOX) <= 8)), BOX
    )
    found = cones_of(kept + white(1), kept + white(2))
    # The signal ends at shell 8 within 30° of the axis, at shell 20 elsewhere; directions are 13° apart.
    assert (found.directions[found.worst] @ axis).abs() > math.cos(math.radians(16))
    assert BOX * PIXEL_SIZE / found.worst_angstrom == pytest.approx(8.5, abs=1)
    assert BOX * PIXEL_SIZE / found.angstrom == pytest.approx(20, abs=1)
    assert found.worst_ratio == pytest.approx(20 / 8.5, rel=0.15)
    assert found.area_ratio < 0.6
    assert found.warning is not None
    assert f"only to {found.worst_angstrom:.2f} Å" in found.warning
    assert found.resolutions.median() == pytest.approx(found.angstrom, rel=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_no_direction_no_warning(seed: int) -> None:
    mask = soft_sphere(BOX, 0.25 * BOX, edge_px=3)
    signal = falling(10 * seed) * mask
    found = cones_of((signal + white(10 * seed + 1)) * mask, (signal + white(10 * seed + 2)) * mask)
    assert found.warning is None
    assert found.worst_ratio < 1.6
    assert found.area_ratio > 0.6


def test_resolution_is_the_crossing_of_a_falling_curve_and_ignores_single_shells() -> None:
    # FSC = 1 - s/32 falls to 0.143 at shell 27.4.
    curve = 1 - torch.arange(33).double() / 32
    stray = curve.clone()
    stray[2] = -0.5
    late = curve.clone()
    late[30] = 0.2
    found = ConicalFsc(cone_directions(3), torch.stack([curve, stray, late]), BOX, PIXEL_SIZE, 4.0)
    shells = BOX * PIXEL_SIZE / found.resolutions
    assert shells.tolist() == pytest.approx([27.424, 27.424, 27.424], abs=1e-3)
    flat = ConicalFsc(cone_directions(2), torch.stack([torch.ones(33), torch.zeros(33)]).double(), BOX, PIXEL_SIZE, 4.0)
    assert (BOX * PIXEL_SIZE / flat.resolutions).tolist() == [31.0, 1.0]


@pytest.mark.parametrize(("worst", "uneven"), [(13.0, False), (8.0, True)])
def test_directions_are_uneven_below_half_of_the_area(worst: float, uneven: bool) -> None:
    # Steps to 1 that end at shell 20 and at a shell of the worst one: areas of 20 and of so many shells.
    shells = torch.arange(33).double()
    curves = torch.stack([(shells <= last).double() for last in (20.0, 20.0, worst)])
    found = ConicalFsc(cone_directions(3), curves, BOX, PIXEL_SIZE, BOX * PIXEL_SIZE / 20)
    assert found.area_ratio == pytest.approx(worst / 20)
    assert found.uneven == uneven


@pytest.mark.pictures
def test_table_and_picture() -> None:
    found = cones_of(falling(0) + white(1), falling(0) + white(2))
    rows = list(csv.DictReader(io.StringIO(found.table())))
    assert len(rows) == len(found.directions)
    assert float(rows[found.worst]["resolution_angstrom"]) == pytest.approx(found.worst_angstrom, abs=1e-4)
    # rot and tilt are those of the direction as a view: (cos rot sin tilt, sin rot sin tilt, cos tilt).
    rot, tilt = (math.radians(float(rows[5][name])) for name in ("rot", "tilt"))
    expected = [math.cos(rot) * math.sin(tilt), math.sin(rot) * math.sin(tilt), math.cos(tilt)]
    assert [float(rows[5][name]) for name in "xyz"] == pytest.approx(expected, abs=1e-3)
    assert cones_figure(found, fsc(falling(0), falling(0)).numpy()).startswith(b"\x89PNG")
