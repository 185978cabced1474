"""Pictures: they are PNG files of a sensible size that show what they were given, and the page holds them."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from scalecryo.evaluate import report

pytestmark = pytest.mark.pictures


def pixels(png: bytes) -> np.ndarray:
    image = imread(io.BytesIO(png))
    assert image.shape[2] == 4
    assert min(image.shape[:2]) > 200
    # More than a blank page.
    assert image[..., :3].std() > 0.02
    return image


def test_every_figure_is_drawn() -> None:
    generator = np.random.default_rng(0)
    volume = generator.normal(size=(24, 24, 24))
    rotation = Rotation.random(500, random_state=0).as_matrix()
    for png in (
        report.fsc_figure({"a": np.linspace(1, 0, 13), "b": np.full(13, -0.3)}, 24, 2.0),
        report.slices_figure({"truth": volume, "estimate": np.zeros_like(volume)}, 2.0),
        report.projections_figure(volume[:4], volume[4:8], ["1.00", "0.50"]),
        report.projections_figure(volume[:0], volume[:0]),
        report.particles_figure(volume[:4], volume[0]),
        report.orientation_figure(rotation),
        report.orientation_figure(rotation[:1]),
        report.confidence_figure(generator.uniform(size=300)),
        report.training_figure(np.arange(500), {"loss": generator.normal(size=500), "gaps": np.full(500, np.nan)}),
        report.training_figure(np.arange(3), {"loss": np.ones(3)}),
    ):
        pixels(png)


def test_viewing_directions_are_where_they_should_be() -> None:
    """Tilt 0 looks down the pole, at the top of the Mollweide projection; tilt 90 and rot 90, right of centre."""
    for angles, (row, column) in (((0, 0, 0), (0.15, 0.5)), ((90, 90, 0), (0.5, 0.75)), ((0, 180, 0), (0.85, 0.5))):
        rotation = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()
        image = pixels(report.orientation_figure(np.repeat(rotation[None], 400, axis=0)))
        # viridis' top colour is yellow: much red and green, little blue.
        yellow = (image[..., 0] > 0.9) & (image[..., 1] > 0.85) & (image[..., 2] < 0.3)
        yellow[:, int(0.85 * image.shape[1]) :] = False  # the colour bar
        rows, columns = np.nonzero(yellow)
        # The map covers rows 0.12 to 0.88 and columns 0.03 to 0.87 of the picture; a cell is a fifth of it.
        assert abs((rows.mean() / image.shape[0] - 0.12) / 0.76 - row) < 0.15
        assert abs((columns.mean() / image.shape[1] - 0.03) / 0.84 - column) < 0.12


def test_page_is_one_file_with_its_pictures() -> None:
    png = report.confidence_figure(np.ones(3))
    page = report.report_html(
        "Run <1>", [report.Section("Maps & more", "a < b", png), report.Section("Text only", "x")]
    )
    images: list[str] = []
    text: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                images.append(dict(attrs)["src"] or "")
            # Nothing is loaded, and without a surface no script runs.
            assert tag not in ("script", "iframe")
            assert all(not (value or "").startswith(("http", "//")) for name, value in attrs if name in ("src", "href"))

        def handle_data(self, data: str) -> None:
            text.append(data)

    Reader().feed(page)
    assert len(images) == 1
    assert images[0].startswith("data:image/png;base64,iVBOR")
    assert "Run <1>" in text
    assert "a < b" in text
