"""The map as a surface: contours of known volume, pictures of a ball, and what the viewer is given."""

import base64
import io
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from scalecryo.evaluate.components import FILM_SIZE, FILM_STEPS, traversal_film
from scalecryo.evaluate.report.surface import DALTON_PER_A3, Surface, otsu_level
from scalecryo.evaluate.report.views import view_picture
from scalecryo.physics.mask import soft_sphere

pytestmark = pytest.mark.pictures
BOX, PIXEL_SIZE, RADIUS = 48, 2.0, 10.0


def ball(centre: tuple[float, float, float] = (0, 0, 0), radius: float = RADIUS) -> torch.Tensor:
    """A ball with a smooth edge, of which the contour at one half is the ball itself; (x, y, z) in px."""
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
    return torch.sigmoid((radius - distance) / 0.7)


def test_otsu_parts_two_values_between_them() -> None:
    mask = torch.ones(BOX, BOX, BOX)
    assert 0.0 < otsu_level((ball() > 0.5).float() * 5 + 2, mask) - 2 < 5


def test_contour_of_a_ball_encloses_it() -> None:
    surface = Surface.of_map(ball(), soft_sphere(BOX, 16), PIXEL_SIZE)
    enclosed = float((surface.density >= 0.5).sum()) * surface.spacing**3
    # The grid is sampled 80 voxels across 38 of the map's: what counts voxels is off by their share at the surface.
    assert enclosed == pytest.approx(4 / 3 * math.pi * (RADIUS * PIXEL_SIZE) ** 3, rel=0.01)
    assert 0.2 < surface.level < 0.8
    # A ball of protein's mean density: 33,510 Å³ at 0.81 Da/Å³ are 27 kDa; its low-pass to 12 Å moves the edge little.
    assert surface.mass_kda == pytest.approx(4 / 3 * math.pi * 20**3 * DALTON_PER_A3 / 1000, rel=0.15)


def test_values_are_kept_by_finer_sampling() -> None:
    surface = Surface.of_map(3 * ball(), soft_sphere(BOX, 16), PIXEL_SIZE)
    assert float(surface.density.max()) == pytest.approx(3.0, abs=0.1)


def test_noise_outside_raises_the_contour() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = ball() + 0.05 * torch.randn(BOX, BOX, BOX, generator=generator)
    surface = Surface.of_map(noisy, soft_sphere(BOX, 16), PIXEL_SIZE, angstrom=8.0)
    assert surface.map_level > 6 * 0.05
    # Low-passed, there is less noise, and the contour may lie lower.
    assert 0 < surface.level < surface.map_level


def test_viewer_gets_the_grid() -> None:
    surface = Surface.of_map(ball(), soft_sphere(BOX, 16), PIXEL_SIZE, size=32)
    data = surface.data()
    grid = np.frombuffer(zlib.decompress(base64.b64decode(data["grid"])), np.uint8).reshape(32, 32, 32)
    low, high = float(data["low"]), float(data["high"])
    values = low + grid / 255 * (high - low)
    expected = surface.density.numpy().clip(low, high)
    assert np.abs(values - expected).max() <= 0.51 * (high - low) / 255


def test_sides_show_what_they_say() -> None:
    """A ball at +x is right in the picture from +z; one at +z is on top from −y and from +x."""
    size = 60
    for centre, side, (row, column) in (
        ((9, 0, 0), 0, (0.5, 0.7)), ((0, 9, 0), 0, (0.3, 0.5)), ((9, 0, 0), 1, (0.5, 0.7)), ((0, 0, 9), 1, (0.3, 0.5)),
        ((0, 9, 0), 2, (0.5, 0.7)), ((0, 0, 9), 2, (0.3, 0.5)),
    ):  # fmt: skip
        surface = Surface(ball(centre, 5.0), PIXEL_SIZE, 0.5, 0.5, 1.0)
        picture = surface.picture(size)
        assert picture.shape == (size, len(Surface.SIDES) * size, 3)
        rows, columns = np.nonzero(picture[: size - 8, side * size : (side + 1) * size].mean(-1) < 250)
        # 9 px of 48 from the middle are 0.19 of the picture; pixels of a flank facing away may be all but white.
        assert rows.mean() / size == pytest.approx(row, abs=0.05)
        assert columns.mean() / size == pytest.approx(column, abs=0.05)


def test_an_empty_map_has_a_picture_too() -> None:
    surface = Surface.of_map(torch.zeros(BOX, BOX, BOX), torch.zeros(BOX, BOX, BOX), PIXEL_SIZE)
    assert surface.picture(40).shape == (40, 120, 3)
    assert surface.level > 0


def test_views_as_a_picture() -> None:
    """All views along +z: the top of Mollweide's ellipse is bright, all else is dark, corners are white."""
    rotation = np.repeat(np.eye(3)[None], 5000, axis=0)
    picture = view_picture(rotation, 100)
    assert picture.shape == (100, 200, 3)
    assert (picture[0, 0] == 255).all()
    assert picture[2, 100, 0] > 200
    assert picture[50, 100, 0] < 90


def test_a_film_goes_along_a_component_and_back() -> None:
    """A ball at +x that comes as one at −x goes: seen from +z, where x is to the right."""
    left, right = ball((-12, 0, 0), 6.0), ball((12, 0, 0), 6.0)
    mask = soft_sphere(BOX, 22)
    # At −2 all of it is on the left, at +2 on the right.
    found = traversal_film((left + right) / 2, (right - left) / 4, mask, PIXEL_SIZE, 12.0, 2.0)
    with Image.open(io.BytesIO(found)) as film:
        assert film.format == "PNG"
        frames = []
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB"), dtype=float)[:-8, :FILM_SIZE])  # but for the bar
    assert len(frames) == 2 * FILM_STEPS - 2
    for number in range(1, FILM_STEPS - 1):
        np.testing.assert_array_equal(frames[number], frames[-number])
    covered = [(frame.min(2) < 250).mean(0) for frame in frames]
    first, last = covered[0], covered[FILM_STEPS - 1]
    half = FILM_SIZE // 2
    assert first[:half].sum() > 5
    assert first[half:].sum() == 0
    # The mirror image about index N/2, to a pixel of the contour's rim.
    np.testing.assert_allclose(first[1:], last[:0:-1], atol=0.03)
