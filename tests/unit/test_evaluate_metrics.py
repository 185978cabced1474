"""Error measures against closed forms."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.stats import mannwhitneyu

from scalecryo.evaluate.compare import compare_poses, summary
from scalecryo.evaluate.metrics import junk_auc, map_errors, rotation_errors


def tensor(rotation: Rotation) -> torch.Tensor:
    return torch.from_numpy(rotation.as_matrix())


def test_a_known_angle_about_any_axis() -> None:
    truth = Rotation.random(200, random_state=0)
    axis = np.random.default_rng(1).normal(size=(200, 3))
    axis *= np.radians(40) / np.linalg.norm(axis, axis=1, keepdims=True)
    errors = rotation_errors(tensor(Rotation.from_rotvec(axis) * truth), tensor(truth))
    assert errors.median_deg == pytest.approx(40, abs=1e-5)
    assert errors.mean_deg == pytest.approx(40, abs=1e-5)
    # ‖ΔR‖²_F = 8 sin²(θ/2)
    assert errors.frobenius2_mean == pytest.approx(8 * np.sin(np.radians(20)) ** 2, rel=1e-6)
    assert errors.frobenius2_median == pytest.approx(errors.frobenius2_mean, rel=1e-6)


def test_in_plane_turns_do_not_change_the_viewing_direction() -> None:
    truth = Rotation.random(50, random_state=0)
    # The last factor acts in the image plane.
    in_plane = rotation_errors(tensor(truth * Rotation.from_euler("z", 25, degrees=True)), tensor(truth))
    assert in_plane.out_of_plane_median_deg == pytest.approx(0, abs=1e-5)
    assert in_plane.median_deg == pytest.approx(25, abs=1e-5)
    tilted = rotation_errors(tensor(truth * Rotation.from_euler("y", 25, degrees=True)), tensor(truth))
    assert tilted.out_of_plane_median_deg == pytest.approx(25, abs=1e-5)


def test_symmetry_related_poses_count_as_right() -> None:
    truth = Rotation.random(90, random_state=0)
    group = Rotation.from_rotvec(np.radians([[0, 0, 0], [0, 0, 120], [0, 0, 240]]))
    estimate = Rotation.concatenate([group[i] * truth[30 * i : 30 * i + 30] for i in range(3)])
    plain = rotation_errors(tensor(estimate), tensor(truth))
    assert plain.mean_deg == pytest.approx(80, abs=1e-5)  # 0, 120 and 120 in equal parts
    modulo = rotation_errors(tensor(estimate), tensor(truth), tensor(group))
    assert modulo.mean_deg == pytest.approx(0, abs=1e-4)


def test_map_errors_of_maps_that_agree_to_a_shell() -> None:
    """Equal below shell 10, independent above: 0.5 is crossed between shells 10 and 11."""
    n = 32
    generator = torch.Generator().manual_seed(0)
    truth, other = (torch.randn(n, n, n, generator=generator) for _ in range(2))
    k = np.fft.fftfreq(n, 1 / n)
    low = torch.from_numpy(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) < 10.5)
    mixed = torch.where(low, torch.fft.fftn(truth), torch.fft.fftn(other))
    errors = map_errors(torch.fft.ifftn(mixed).real, truth, 2.0)
    assert 10 < errors.shell_05 < errors.shell_0143 < 11
    assert errors.angstrom_05 == pytest.approx(2.0 * n / errors.shell_05)
    # Ten shells of one and five of about zero (a shell of 11 px radius has 1,500 coefficients: ± 0.04).
    assert errors.mean == pytest.approx(10 / 15, abs=0.03)


def test_fit_and_score_are_on_different_rows() -> None:
    """Odd rows are all 10° off about one axis: a fit on the even rows must not hide that."""
    truth = Rotation.random(100, random_state=0)
    estimate = tensor(truth)
    estimate[1::2] = tensor(Rotation.from_euler("x", 10, degrees=True) * truth)[1::2]
    found = compare_poses(estimate, tensor(truth), None, None, torch.eye(3)[None])
    assert found.errors.median_deg == pytest.approx(10, abs=1e-4)
    assert found.shift_median_px is None
    assert found.modulo is None


def test_summary_says_none_where_nothing_was_compared() -> None:
    line = summary(None, None, None)
    assert set(line.values()) == {None}
    assert {"images", "rotation_error_median_deg", "shift_error_median_px", "fsc_0.5_angstrom", "hand"} <= set(line)


def test_shifts_are_judged_at_the_symmetry_related_pose() -> None:
    """Poses at random mates of a C3 map whose origin is off by u: the shifts that explain the images have no error."""
    rng = np.random.default_rng(3)
    symmetry = np.stack([Rotation.from_euler("z", angle, degrees=True).as_matrix() for angle in (0, 120, 240)])
    truth, shift = Rotation.random(200, random_state=5).as_matrix(), rng.normal(size=(200, 2))
    found = symmetry[rng.integers(0, 3, 200)] @ truth
    # A point y of the true map lies at y - u of the estimated one, and is seen at Rᵀ(y - u) + shift.
    moved = shift + (np.array([1.0, -2.0, 0.5]) @ found)[:, :2]
    tensors = [torch.from_numpy(array) for array in (found, truth, moved, shift, symmetry)]
    compared = compare_poses(*tensors)
    assert compared.modulo is not None
    assert compared.modulo.mean_deg == pytest.approx(0, abs=1e-6)
    assert compared.shift_median_px == pytest.approx(0, abs=1e-9)


def test_how_well_confidence_tells_junk() -> None:
    """Against Mann and Whitney's U of scipy, with and without ties."""
    rng = np.random.default_rng(0)
    particle = rng.random(400) < 0.7
    for confidence in (rng.random(400) + 0.5 * particle, rng.integers(0, 5, 400) + particle.astype(float)):
        u = mannwhitneyu(confidence[particle], confidence[~particle]).statistic
        assert junk_auc(confidence, particle) == pytest.approx(u / (particle.sum() * (~particle).sum()), rel=1e-12)
    assert junk_auc(np.array([0.1, 0.9, 0.8]), np.array([False, True, True])) == 1.0
