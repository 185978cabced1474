"""Pictures as PNG bytes, and one HTML file that holds them. No pyplot, so no state is shared between figures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from scalecryo.evaluate.cones import ConicalFsc

_DPI = 110


@dataclass(frozen=True)
class Section:
    """One part of a report: a heading, plain text (may be empty), and a PNG (or None)."""

    title: str
    text: str = ""
    png: bytes | None = None


def fsc_figure(
    curves: Mapping[str, NDArray[np.floating]],
    box_size: int,
    pixel_size: float,
    thresholds: Sequence[float] = (0.5, 0.143),
    title: str = "Fourier shell correlation",
) -> bytes:
    """Curves on integer shells (DC first) against spatial frequency, with the thresholds drawn.

    `pixel_size` in Å; shell s is the frequency s / (box_size · pixel_size).
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    length = box_size * pixel_size
    for name, curve in curves.items():
        shells = np.arange(len(curve))
        # The shell at Nyquist is cut by the corner of the transform and says nothing.
        shown = slice(1, min(len(curve), box_size // 2))
        axes.plot(shells[shown] / length, np.asarray(curve)[shown], linewidth=1.8, label=name)
    for threshold in thresholds:
        axes.axhline(threshold, color="0.45", linewidth=0.9, linestyle="--")
        axes.text(0.002, threshold + 0.01, f"{threshold:g}", transform=axes.get_yaxis_transform(), color="0.35")
    axes.set(xlim=(0, 0.5 / pixel_size), ylim=(min(-0.05, _lowest(curves)), 1.03), ylabel="correlation", title=title)
    axes.set_xlabel("resolution (Å)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1 / s:.2g}" if s > 0 else "∞"))
    shell_axis = axes.secondary_xaxis("top", functions=(partial(mul, length), partial(mul, 1 / length)))
    shell_axis.set_xlabel("Fourier shell (cycles per box)", fontsize="small")
    shell_axis.tick_params(labelsize="small")
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    return _png(figure)


def slices_figure(
    volumes: Mapping[str, NDArray[np.floating]], pixel_size: float, title: str = "Central slices"
) -> bytes:
    """The three central planes of each map, one map a row on its own grey scale; `pixel_size` in Å."""
    figure = Figure(figsize=(8.6, 2.9 * len(volumes) + 0.4), layout="constrained")
    grid = figure.subplots(len(volumes), 3, squeeze=False)
    for row, (name, volume) in zip(grid, volumes.items(), strict=True):
        centre = volume.shape[0] // 2
        extent = np.array([-centre, volume.shape[0] - centre] * 2) * pixel_size
        low, high = np.percentile(volume, [0.5, 99.9])
        planes = (volume[centre], volume[:, centre], volume[:, :, centre])
        for axes, plane, labels in zip(row, planes, (("x", "y"), ("x", "z"), ("y", "z")), strict=True):
            axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), extent=extent, origin="lower")
            axes.set(xlabel=f"{labels[0]} (Å)", ylabel=f"{labels[1]} (Å)")
            axes.tick_params(labelsize="small")
        row[1].set_title(name)
    figure.suptitle(title)
    return _png(figure)


def projections_figure(
    images: NDArray[np.floating],
    projections: NDArray[np.floating],
    title: str = "Particles and the map's projections at their poses",
) -> bytes:
    """Images (n, y, x) above the projections (n, y, x) that should explain them, each on its own grey scale."""
    count = len(images)
    figure = Figure(figsize=(1.45 * count + 0.5, 3.5), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    for row, stack, label in zip(grid, (images, projections), ("particle", "projection"), strict=True):
        for axes, image in zip(row, stack, strict=True):
            low, high = np.percentile(image, [0.5, 99.5])
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    figure.suptitle(title)
    return _png(figure)


def orientation_figure(rotation: NDArray[np.floating], title: str = "Viewing directions") -> bytes:
    """Where the particles were seen from: density of the third columns of `rotation` (n, 3, 3) on equal-area cells.

    Longitude is rlnAngleRot, latitude 90° − rlnAngleTilt. The colour is the count over that of a uniform distribution.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot(projection="mollweide")
    rows = int(np.clip(np.sqrt(len(rotation) / 100), 4, 36))
    direction = np.asarray(rotation)[:, :, 2]
    longitude = np.arctan2(direction[:, 1], direction[:, 0])
    height = direction[:, 2].clip(-1, 1)
    counts, longitude_edges, _ = np.histogram2d(
        longitude, height, bins=(2 * rows, rows), range=((-np.pi, np.pi), (-1, 1))
    )
    relative = counts.T * counts.size / max(len(rotation), 1)
    top = max(2.0, float(relative.max(initial=0.0)))
    # A cell is drawn with straight edges, so it is drawn in strips that follow the ellipse.
    strips = 12
    latitude_edges = np.arcsin(np.linspace(-1, 1, strips * rows + 1))
    mesh = axes.pcolormesh(
        longitude_edges,
        latitude_edges,
        np.repeat(relative, strips, axis=0),
        cmap="viridis",
        vmin=0,
        vmax=top,
        rasterized=True,
    )
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize="x-small")
    axes.tick_params(axis="x", colors="white")
    figure.colorbar(mesh, ax=axes, shrink=0.75, label="count ÷ uniform")
    axes.set_title(f"{title} ({len(rotation):,} particles)", pad=14)
    return _png(figure)


def cones_figure(
    cones: ConicalFsc, whole: NDArray[np.floating], title: str = "Fourier shell correlation by direction"
) -> bytes:
    """A map of the resolution in each direction of Fourier space, beside the curves of the cones and of the whole map.

    Longitude and latitude as in `orientation_figure`; every point takes the nearest direction, or its opposite.
    """
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    sphere = figure.add_subplot(1, 2, 1, projection="mollweide")
    longitude, latitude = np.linspace(-np.pi, np.pi, 145), np.linspace(-np.pi / 2, np.pi / 2, 73)
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
    return _png(figure)


def confidence_figure(confidence: NDArray[np.floating], title: str = "Confidence of the poses") -> bytes:
    """Histogram of how sure each particle's pose is, from 0 to 1."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(np.asarray(confidence), bins=50, range=(0, 1), color="tab:blue")
    median = float(np.median(confidence))
    axes.axvline(median, color="tab:orange", linewidth=1.6, label=f"median {median:.2f}")
    axes.set(xlim=(0, 1), xlabel="confidence (0: none, 1: certain)", ylabel="particles", title=title)
    axes.legend()
    return _png(figure)


def training_figure(
    steps: NDArray[np.integer],
    panels: Mapping[str, NDArray[np.floating]],
    title: str = "Training",
    x_label: str = "step",
) -> bytes:
    """One panel a quantity over the steps; the key is the label of its axis. NaN leaves a gap."""
    figure = Figure(figsize=(7, 2.1 * len(panels) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (label, values) in zip(grid, panels.items(), strict=True):
        _smoothed_curve(axes, np.asarray(steps), np.asarray(values, dtype=float))
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    grid[-1].set_xlabel(x_label)
    figure.suptitle(title)
    return _png(figure)


def report_html(title: str, sections: Sequence[Section]) -> str:
    """One HTML page with every picture inside it, so that the file can be moved or mailed alone."""
    parts = []
    for section in sections:
        parts.append(f"<section>\n<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<pre>{html.escape(section.text)}</pre>")
        if section.png is not None:
            data = base64.b64encode(section.png).decode("ascii")
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        parts.append("</section>")
    body = "\n".join(parts)
    heading = html.escape(title)
    return _PAGE.replace("{{title}}", heading).replace("{{body}}", body)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; }
section { border-top: 1px solid #ddd; padding-top: .5rem; margin-top: 1.5rem; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .75rem; border-radius: 4px; font-size: 14px; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{title}}</h1>
{{body}}
</body>
</html>
"""


def _smoothed_curve(axes: Axes, steps: NDArray[np.integer], values: NDArray[np.floating]) -> None:
    """The values, faint, under their running mean where there are enough of them."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    window = len(values) // 50
    if window < 2:
        axes.plot(
            steps, values, color="tab:blue", linewidth=1.6, marker="o" if len(values) < 15 else None, markersize=3
        )
        return
    axes.plot(steps, values, color="tab:blue", linewidth=0.7, alpha=0.35)
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window // 2 :][: len(mean)], mean, color="tab:blue", linewidth=1.8)


def _lowest(curves: Mapping[str, NDArray[np.floating]]) -> float:
    """Lowest value of all curves, a little below it, for the axis limit."""
    values = [float(np.nanmin(np.asarray(curve)[1:])) - 0.03 for curve in curves.values() if len(curve) > 1]
    return min(values, default=0.0)


def _png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
