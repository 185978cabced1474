"""What simulation adds to ideal data, against closed forms and the distributions that were asked for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.data.particles import ParticleTable
from scalecryo.data.simulation.density import diameter
from scalecryo.data.simulation.imperfections import (
    Conditions,
    draw_conditions,
    with_defocus_errors,
    with_preferred_views,
)
from scalecryo.data.simulation.micelle import with_micelle
from scalecryo.data.simulation.noise import Noise
from scalecryo.data.simulation.particles import draw_particles
from scalecryo.data.simulation.projector import Projector
from scalecryo.data.simulation.recording import Recording
from scalecryo.data.simulation.settings import Imaging, Imperfections
from scalecryo.errors import InputError
from tests.unit.test_simulation import blobs

BOX, PIXEL_SIZE, SIGMA_PX = 48, 1.5, 1.8


def drawn(count: int, **settings: Any) -> ParticleTable:
    return draw_particles(count, Imaging(PIXEL_SIZE, **settings), "s.mrcs", torch.Generator().manual_seed(1))


def test_coloured_noise_has_the_spectrum_of_its_formula() -> None:
    """Correlations of pixels at a distance are the spectrum's transform, 1/(1 + (30 Å s)²) for half of the power."""
    count, box, pixel_size, sigma = 300, 64, 2.0, 3.0
    noise = Noise(sigma, 0.5, box, pixel_size, *(torch.Generator().manual_seed(seed) for seed in (0, 1)))
    images = noise.draw(count).double().numpy()
    # 1.2 million pixels, each correlated with some forty others: known to 0.6 %; four standard errors.
    assert images.var() == pytest.approx(sigma**2, rel=0.025)
    s = np.fft.fftfreq(2 * box, pixel_size)
    power = 1 / (1 + 900 * (s[:, None] ** 2 + s**2))
    low_pass = np.fft.ifft2(power / power.mean()).real  # the grid on which it is made; others differ by sampling
    for lag in (1, 2, 4, 8):
        expected = 0.5 * low_pass[0, lag]
        for a, b in ((images[:, :, lag:], images[:, :, :-lag]), (images[:, lag:], images[:, :-lag])):
            assert (a * b).mean() / sigma**2 == pytest.approx(expected, abs=0.01)
    # Opposite edges are as far apart as they look: cut from a micrograph, not from a torus. 19,200 pairs.
    assert abs((images[:, :, 0] * images[:, :, -1]).mean()) / sigma**2 < 0.05
    transform = (np.abs(np.fft.fft2(images)) ** 2).mean(0) / box**2 / sigma**2
    f = np.fft.fftfreq(box, pixel_size)
    radius = np.hypot(f[:, None], f)
    inner = 1 / (1 + 900 * radius**2)
    wanted = 0.5 + 0.5 * inner / power.mean()
    for low, high in ((0.04, 0.08), (0.08, 0.12), (0.12, 0.18), (0.18, 0.25)):
        ring = (radius > low) & (radius <= high)
        # Edges leak some of the low frequencies' power outwards: measured below 2 % from 25 Å on.
        assert transform[ring].mean() == pytest.approx(wanted[ring].mean(), rel=0.03)


def test_white_noise_is_drawn_as_ever() -> None:
    noise = Noise(2.0, 0.0, 16, 1.0, torch.Generator().manual_seed(3), torch.Generator())
    expected = 2.0 * torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise.draw(5), expected)


def test_preferred_views_are_uniform_in_their_cap_and_elsewhere() -> None:
    count, share, degrees = 6000, 0.8, 25.0
    table = drawn(count)
    views = with_preferred_views(table, (share, degrees), 0).columns["rotation"].astype(np.float64)
    np.testing.assert_allclose(views @ views.transpose(0, 2, 1), np.broadcast_to(np.eye(3), views.shape), atol=1e-5)
    height = views[:, 2, 2]
    limit = math.cos(math.radians(degrees))
    changed = np.abs(views - table.columns["rotation"]).max(axis=(1, 2)) > 0
    assert changed.sum() == round(share * count)
    assert height[changed].min() >= limit - 1e-6
    # Uniform on the cap: the height is uniform, the azimuths of view and in-plane turn too. Four standard errors.
    spread = (1 - limit) / math.sqrt(12)
    assert height[changed].mean() == pytest.approx((1 + limit) / 2, abs=4 * spread / math.sqrt(changed.sum()))
    angles = Rotation.from_matrix(views[changed]).as_euler("ZYZ")
    for azimuth in angles[:, 0], angles[:, 2]:
        assert abs(np.exp(1j * azimuth).mean()) < 4 / math.sqrt(changed.sum())
    # Those that are left are uniform on the sphere.
    assert height[~changed].mean() == pytest.approx(0, abs=4 / math.sqrt(3 * (~changed).sum()))


def test_a_defocus_error_is_one_number_a_particle() -> None:
    table = drawn(4000, defocus_um=(0.8, 2.0), astigmatism_um=0.1)
    told = with_defocus_errors(table, 100.0, 0)
    error_u, error_v = (
        told.columns[name].astype(np.float64) - table.columns[name] for name in ("defocus_u", "defocus_v")
    )
    # Single precision of 20,000 Å.
    np.testing.assert_allclose(error_u, error_v, atol=0.005)
    assert error_u.std() == pytest.approx(100, rel=4 / math.sqrt(8000))
    assert error_u.mean() == pytest.approx(0, abs=4 * 100 / math.sqrt(4000))
    with pytest.raises(InputError, match="CTF"):
        with_defocus_errors(drawn(3), 100.0, 0)


def test_conditions_have_the_shares_and_spreads_asked_for() -> None:
    count = 5001
    wanted = Imperfections(scale_sd=0.15, gain_sd=0.3, junk=0.3, neighbours=0.2)
    found = draw_conditions(count, wanted, 3, 7)
    np.testing.assert_array_equal(found.micrograph, np.arange(count) // 100)
    assert [(found.junk == kind).sum() for kind in (1, 2)] == [750, 750]
    assert found.neighbours is not None
    assert not found.neighbours.present[found.junk == 1].any()
    # A fifth of the images, but for the 15 % that are empty.
    assert found.neighbours.present.mean() == pytest.approx(0.2 * 0.85, abs=4 * math.sqrt(0.2 * 0.15 / count))
    assert len(np.unique(found.scale)) == 51
    assert all(len(set(found.scale[start : start + 100])) == 1 for start in range(0, count, 100))
    # The standard deviation of n normal numbers is known to 1/√(2n); four of them.
    assert np.log(np.unique(found.scale)).std() == pytest.approx(0.15, rel=4 / math.sqrt(102))
    assert np.log(found.gain).std() == pytest.approx(0.3, rel=4 / math.sqrt(2 * count))
    assert found.offset.std() == pytest.approx(0.9, rel=4 / math.sqrt(2 * count))
    for number in range(3):
        assert (found.class_index == number).mean() == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / count))


def test_one_option_does_not_change_the_draws_of_another() -> None:
    alone = {"scale_sd": 0.15, "gain_sd": 0.3, "junk": 0.3, "neighbours": 0.2}
    together = draw_conditions(300, Imperfections(**alone), 2, 5)
    for name, value in alone.items():
        single = draw_conditions(300, Imperfections(**{name: value}), 2, 5)
        np.testing.assert_array_equal(single.class_index, together.class_index)
        if name == "scale_sd":
            np.testing.assert_array_equal(single.scale, together.scale)
        if name == "gain_sd":
            np.testing.assert_array_equal(single.gain, together.gain)
            np.testing.assert_array_equal(single.offset, together.offset)
        if name == "junk":
            np.testing.assert_array_equal(single.junk, together.junk)
        if name == "neighbours":
            assert single.neighbours is not None
            assert together.neighbours is not None
            np.testing.assert_array_equal(single.neighbours.rotation, together.neighbours.rotation)
            apart = single.neighbours.present != together.neighbours.present
            np.testing.assert_array_equal(apart, single.neighbours.present & (together.junk == 1))
    assert not np.array_equal(draw_conditions(300, Imperfections(**alone), 2, 6).gain, together.gain)


class Specimen:
    """Blobs within 10 px of the centre, and recordings of them."""

    def __init__(self) -> None:
        directions = np.random.default_rng(0).normal(size=(30, 3))
        self.points = 10 * directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(1)
        self.volume = torch.from_numpy(blobs(self.points, BOX, SIGMA_PX, 3)).float()
        self.diameter = diameter(self.volume, PIXEL_SIZE)

    def seen(self, rotation: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
        return blobs((self.points @ rotation.astype(np.float64))[:, :2] + shift_px, BOX, SIGMA_PX, 2)

    def recorded(
        self, table: ParticleTable, wanted: Imperfections, snr_db: float | None = None
    ) -> tuple[np.ndarray, Conditions]:
        conditions = draw_conditions(len(table), wanted, 1, 9)
        projector = Projector(self.volume, PIXEL_SIZE)
        generator = torch.Generator().manual_seed(2)
        recording = Recording([projector], self.diameter, table, conditions, wanted, snr_db, generator, 9)
        images = torch.cat(list(recording.chunks()))
        return images.double().numpy(), conditions


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return Specimen()


def test_the_diameter_is_that_of_the_density(specimen: Specimen) -> None:
    # A ball of 12 px: its sum of squares within a radius r grows as r³, and 95 % of it lie within 0.983 of 12 px.
    axis = torch.arange(BOX) - BOX // 2
    ball = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 <= 144).float()
    assert diameter(ball, PIXEL_SIZE) == pytest.approx(2 * 12 * PIXEL_SIZE, abs=2 * PIXEL_SIZE)


def test_junk_shows_nothing_or_another_object(specimen: Specimen) -> None:
    table = drawn(200, defocus_um=(0.8, 1.6), shift_a=2.0)
    clean, _ = specimen.recorded(table, Imperfections())
    images, conditions = specimen.recorded(table, Imperfections(junk=0.4))
    np.testing.assert_array_equal(images[conditions.junk == 0], clean[conditions.junk == 0])
    assert not images[conditions.junk == 1].any()
    other = images[conditions.junk == 2]
    assert len(other) == 40
    # Each has the particles' mean variance, and none looks like the particle it stands for, nor like the next one.
    np.testing.assert_allclose(other.var(axis=(1, 2)), clean.var(axis=(1, 2)).mean(), rtol=1e-4)
    correlation = np.corrcoef(np.concatenate([other, clean[conditions.junk == 2]]).reshape(80, -1))
    assert np.abs(correlation[:40, :40] - np.eye(40)).max() < 0.95
    # They lie where a particle would: the centre of mass of the squares within the particle's radius.
    axis = (np.arange(BOX) - BOX // 2) * PIXEL_SIZE
    weight = other**2 / (other**2).sum(axis=(1, 2), keepdims=True)
    distance = np.hypot((weight.sum(1) * axis).sum(-1), (weight.sum(2) * axis).sum(-1))
    assert distance.max() < specimen.diameter / 2


def test_a_neighbour_is_the_particle_at_another_pose(specimen: Specimen) -> None:
    """Against the blobs' closed form, at 0.9 to 1.3 diameters from the centre of the box."""
    table = drawn(60)
    clean, _ = specimen.recorded(table, Imperfections())
    images, conditions = specimen.recorded(table, Imperfections(neighbours=0.5))
    neighbours = conditions.neighbours
    assert neighbours is not None
    assert neighbours.present.sum() == 30
    np.testing.assert_array_equal(images[~neighbours.present], clean[~neighbours.present])
    assert 0.9 <= neighbours.distance.min() <= neighbours.distance.max() <= 1.3
    for row in np.flatnonzero(neighbours.present):
        place = specimen.diameter / PIXEL_SIZE * neighbours.distance[row] * neighbours.direction[row]
        expected = specimen.seen(neighbours.rotation[row], place)
        # The projector's own error: 0.1 % of the whole particle.
        scale = np.linalg.norm(specimen.seen(neighbours.rotation[row], np.zeros(2)))
        assert np.linalg.norm(images[row] - clean[row] - expected) < 5e-3 * scale


def test_scale_gain_and_grey_level(specimen: Specimen) -> None:
    table = drawn(250)
    clean, _ = specimen.recorded(table, Imperfections())
    scaled, conditions = specimen.recorded(table, Imperfections(scale_sd=0.2))
    np.testing.assert_allclose(scaled, clean * conditions.scale[:, None, None], rtol=1e-5, atol=1e-6)
    noisy, _ = specimen.recorded(table, Imperfections(), snr_db=-10.0)
    gained, conditions = specimen.recorded(table, Imperfections(gain_sd=0.3), snr_db=-10.0)
    sigma = math.sqrt(clean.var() * 10)
    expected = conditions.gain[:, None, None] * noisy + sigma * conditions.offset[:, None, None]
    np.testing.assert_allclose(gained, expected, rtol=1e-4, atol=1e-4 * sigma)
    # The noise stays that of an ideal set when junk and scale are switched on.
    both, conditions = specimen.recorded(table, Imperfections(scale_sd=0.2, junk=0.2), snr_db=-10.0)
    noise = (both - clean * conditions.scale[:, None, None])[conditions.junk == 0]
    np.testing.assert_allclose(noise, (noisy - clean)[conditions.junk == 0], atol=1e-4 * sigma)


def test_a_micelle_is_a_belt_about_z_of_the_density_asked_for() -> None:
    """About a ball of 30 Å: half as dense as the ball where it is whole, nothing above 25 Å, the same all around."""
    box, pixel_size = 96, 2.0
    axis = (torch.arange(box) - box // 2) * pixel_size
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    ball = 2.0 * torch.sigmoid((30 - radius) / 1.0)
    belt = (with_micelle(ball, pixel_size, 0.5) - ball).numpy()
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    across, r = np.hypot(x, y), radius.numpy()
    # Just outside the protein's soft edge, at mid-height, the belt is whole: half of 2. The surface that is found on
    # the ball may lie half a voxel, 1 Å, outside of it, which makes its mean density (30/31)³ = 0.91 of 2 at least.
    whole = (np.abs(z) < 6) & (across > 42) & (across < 46)
    assert belt[whole].min() == pytest.approx(belt[whole].max(), rel=0.02)
    assert 0.9 < belt[whole].mean() <= 1.0
    assert np.abs(belt[(np.abs(z) > 25) | (across > 60)]).max() == 0
    assert np.abs(belt[r < 25]).max() < 1e-3
    # The same after a quarter of a turn about z, and upside down: about index n//2.
    inner = belt[1:, 1:, 1:]
    np.testing.assert_allclose(inner, np.rot90(inner, axes=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(inner, inner[::-1], atol=1e-5)
    assert torch.equal(with_micelle(ball, pixel_size, 0.0), ball)
    with pytest.raises(InputError, match="box of at least"):
        with_micelle(ball[20:76, 20:76, 20:76], pixel_size, 0.5)
    with pytest.raises(InputError, match="density"):
        with_micelle(ball, pixel_size, -0.5)


def test_imperfections_that_mean_nothing() -> None:
    for settings, message in (
        ({"colour": 1.1}, "colour"),
        ({"junk": -0.1}, "junk"),
        ({"neighbours": 2.0}, "neighbours"),
        ({"prefer": (1.5, 20.0)}, "preferred"),
        ({"prefer": (0.5, 0.0)}, "degrees"),
        ({"scale_sd": -1.0}, "scale"),
        ({"gain_sd": float("nan")}, "gain"),
        ({"defocus_error_a": float("inf")}, "defocus error"),
    ):
        with pytest.raises(InputError, match=message):
            Imperfections(**settings)  # type: ignore[arg-type]


def test_threads_change_no_bit(specimen: Specimen) -> None:
    """Whether images were made ahead on threads or kept since the noise was measured by them."""
    table, wanted, threads = (
        drawn(600, defocus_um=(0.8, 1.6), shift_a=2.0),
        Imperfections(junk=0.2),
        torch.get_num_threads(),
    )
    found = []
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            found.append(specimen.recorded(table, wanted, snr_db=0.0)[0])
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)
