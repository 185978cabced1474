"""Grey pictures: slices of maps."""

import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scalecryo.evaluate.report.figure import png_of

LINE = 72  # characters that fit over a row
SAMPLED = 300_000  # voxels that the grey scale is judged by, at least


def slices_figure(
    volumes: Mapping[str, NDArray[np.floating]], pixel_size: float, title: str = "Central slices"
) -> bytes:
    """The three central planes of each map, one map a row on its own grey scale; `pixel_size` in Å."""
    figure = Figure(figsize=(8.6, 2.9 * len(volumes) + 0.4), layout="constrained")
    grid = figure.subplots(len(volumes), 3, squeeze=False)
    for row, (name, volume) in zip(grid, volumes.items(), strict=True):
        centre = volume.shape[0] // 2
        extent = np.array([-centre, volume.shape[0] - centre] * 2) * pixel_size
        # An odd step comes by every column of an even box.
        step = max(1, (volume.size // SAMPLED - 1) | 1)
        low, high = np.percentile(volume.reshape(-1)[::step], [0.5, 99.9])
        planes = (volume[centre], volume[:, centre], volume[:, :, centre])
        for axes, plane, labels in zip(row, planes, (("x", "y"), ("x", "z"), ("y", "z")), strict=True):
            axes.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), extent=extent, origin="lower")
            axes.set(xlabel=f"{labels[0]} (Å)", ylabel=f"{labels[1]} (Å)")
            axes.tick_params(labelsize="small")
        row[1].set_title(textwrap.fill(name, LINE))
    figure.suptitle(title)
    return png_of(figure)
