"""Where particles were seen from, and how far each direction is resolved."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from scalecryo.evaluate.cones import ConicalFsc
from scalecryo.evaluate.report.figure import png_of

CELL_DEG = 7.5
LEAST_IN_CELL = 4.0  # particles that a cell should hold on average; below, cells are larger


def orientation_figure(rotation: NDArray[np.floating], title: str = "Viewing directions") -> bytes:
    """Where the particles were seen from: density of the third columns of `rotation` (n, 3, 3) on equal-area cells.

    Cells are 7.5° wide at the equator, or larger where particles are few. Longitude is rlnAngleRot, latitude
    90° − rlnAngleTilt. The colour is the count over that of a uniform distribution.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot(projection="mollweide")
    relative, rows = _view_density(rotation)
    top = max(2.0, float(relative.max(initial=0.0)))
    # A cell is drawn with straight edges, so it is drawn in strips that follow the ellipse.
    strips = max(2, 48 // rows)
    mesh = axes.pcolormesh(
        np.linspace(-np.pi, np.pi, 2 * rows + 1),
        np.arcsin(np.linspace(-1, 1, strips * rows + 1)),
        np.repeat(relative, strips, axis=0),
        cmap="viridis", vmin=0, vmax=top, rasterized=True,
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize="x-small")
    axes.tick_params(axis="x", colors="white")
    figure.colorbar(mesh, ax=axes, shrink=0.75, label="count ÷ uniform")
    width = 180 / rows
    axes.set_title(f"{title} ({len(rotation):,} particles, cells of {width:.3g}°)", pad=14)
    return png_of(figure)


def view_picture(rotation: NDArray[np.floating], height: int = 120) -> NDArray[np.uint8]:
    """The same without axes: an image (height, 2 height, 3) in Mollweide's projection, on white."""
    relative, rows = _view_density(rotation)
    x, y = np.meshgrid((np.arange(2 * height) + 0.5) / height - 1, 1 - 2 * (np.arange(height) + 0.5) / height)
    theta = np.arcsin(y)
    latitude = np.arcsin(((2 * theta + np.sin(2 * theta)) / np.pi).clip(-1, 1))
    longitude = np.pi * x / np.maximum(np.cos(theta), 1e-9)
    inside = np.abs(longitude) < np.pi
    row = ((np.sin(latitude) + 1) / 2 * rows).astype(int).clip(0, rows - 1)
    column = ((longitude / np.pi + 1) * rows).astype(int).clip(0, 2 * rows - 1)
    colour = colormaps["viridis"](relative[row, column] / max(2.0, float(relative.max(initial=0.0))))[..., :3]
    picture: NDArray[np.uint8] = (np.where(inside[..., None], colour, 1.0) * 255).round().astype(np.uint8)
    return picture


def _view_density(rotation: NDArray[np.floating]) -> tuple[NDArray[np.floating], int]:
    """Counts over those of a uniform distribution on (rows, 2 rows) cells of equal area, from −z up; and the rows."""
    finest = round(180 / CELL_DEG)
    rows = int(np.clip(np.sqrt(len(rotation) / (2 * LEAST_IN_CELL)), 4, finest))
    direction = np.asarray(rotation)[:, :, 2]
    longitude = np.arctan2(direction[:, 1], direction[:, 0])
    height = direction[:, 2].clip(-1, 1)
    counts, _, _ = np.histogram2d(longitude, height, bins=(2 * rows, rows), range=((-np.pi, np.pi), (-1, 1)))
    return counts.T * counts.size / max(len(rotation), 1), rows


def cones_figure(
    cones: ConicalFsc, whole: NDArray[np.floating], title: str = "Fourier shell correlation by direction"
) -> bytes:
    """A map of the resolution in each direction of Fourier space, beside the curves of the cones and of the whole map.

    Longitude and latitude as in `orientation_figure`; every point takes the nearest direction, or its opposite.
    """
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    sphere = figure.add_subplot(1, 2, 1, projection="mollweide")
    longitude, latitude = np.linspace(-np.pi, np.pi, 97), np.linspace(-np.pi / 2, np.pi / 2, 49)
    middle = [(edges[1:] + edges[:-1]) / 2 for edges in (longitude, latitude)]
    along, up = np.meshgrid(*middle)
    points = np.stack([np.cos(along) * np.cos(up), np.sin(along) * np.cos(up), np.sin(up)], -1)
    nearest = np.abs(points @ cones.directions.cpu().numpy().T).argmax(-1)
    resolutions = cones.resolutions.cpu().numpy()
    mesh = sphere.pcolormesh(longitude, latitude, resolutions[nearest], cmap="viridis_r", rasterized=True)
    rot, tilt = np.deg2rad(cones.angles_deg[cones.worst].cpu().numpy())
    opposite = rot - np.pi if rot > 0 else rot + np.pi
    sphere.plot([rot, opposite], [np.pi / 2 - tilt, tilt - np.pi / 2], "x", color="tab:red", label="worst")
    sphere.grid(alpha=0.3)
    sphere.tick_params(labelsize="x-small")
    sphere.legend(loc="lower right", fontsize="small")
    figure.colorbar(mesh, ax=sphere, shrink=0.7, label="FSC 0.143 (Å)")
    axes = figure.add_subplot(1, 2, 2)
    curves, shown = cones.curves.cpu().numpy(), slice(1, cones.box_size // 2)
    frequency = np.arange(curves.shape[1])[shown] / (cones.box_size * cones.pixel_size)
    low, high = np.quantile(curves[:, shown], [0, 1], axis=0)
    axes.fill_between(frequency, low, high, color="0.85", label=f"all {len(curves)} cones")
    low, high = np.quantile(curves[:, shown], [0.25, 0.75], axis=0)
    axes.fill_between(frequency, low, high, color="0.65", label="middle half of them")
    axes.plot(frequency, curves[cones.worst][shown], color="tab:red", linewidth=1.4, label="worst cone")
    axes.plot(frequency, whole[shown], color="tab:blue", linewidth=1.8, label="whole map")
    axes.axhline(0.143, color="0.45", linewidth=0.9, linestyle="--")
    axes.set(xlim=(0, 0.5 / cones.pixel_size), ylim=(-0.35, 1.03), xlabel="resolution (Å)", ylabel="correlation")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1 / s:.2g}" if s > 0 else "∞"))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize="small")
    figure.suptitle(title)
    return png_of(figure)
