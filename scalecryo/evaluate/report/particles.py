"""What is told of single particles: images beside projections, and how sure their poses are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scalecryo.evaluate.report.figure import png_of


def projections_figure(
    images: NDArray[np.floating],
    projections: NDArray[np.floating],
    labels: Sequence[str] = (),
    title: str = "Particles and the map's projections at their poses",
) -> bytes:
    """Images (n, y, x), the same smoothed, and the projections (n, y, x) that should explain them, in three rows.

    Every image has its own grey scale. `labels` stand above the columns.
    """
    count = max(len(images), 1)
    figure = Figure(figsize=(max(1.3 * count + 0.5, 4.0), 4.7), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    smoothed = np.stack([_smoothed(image) for image in images]) if len(images) else images
    rows = ((images, "particle"), (smoothed, "smoothed"), (projections, "projection"))
    for row, (stack, label) in zip(grid, rows, strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes, image in zip(row, stack, strict=False):
            low, high = np.percentile(image, [0.5, 99.5])
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower")
        row[0].set_ylabel(label)
    for axes, label in zip(grid[0], labels, strict=False):
        axes.set_title(label, fontsize="small")
    figure.suptitle(title)
    return png_of(figure)


def _smoothed(image: NDArray[np.floating]) -> NDArray[np.floating]:
    """Through a Gaussian filter, σ a thirtieth of the box, by which the eye sees a noisy particle."""
    frequency = [np.fft.fftfreq(image.shape[0]), np.fft.rfftfreq(image.shape[1])]
    squared = frequency[0][:, None] ** 2 + frequency[1] ** 2
    sigma = image.shape[0] / 30
    return np.fft.irfft2(np.fft.rfft2(image) * np.exp(-2 * (np.pi * sigma) ** 2 * squared), image.shape)


def confidence_figure(confidence: NDArray[np.floating], title: str = "Confidence of the poses") -> bytes:
    """Histogram of how sure each particle's pose is, from 0 to 1."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(np.asarray(confidence), bins=50, range=(0, 1), color="tab:blue")
    median = float(np.median(confidence))
    axes.axvline(median, color="tab:orange", linewidth=1.6, label=f"median {median:.2f}")
    axes.set(xlim=(0, 1), xlabel="confidence (0: none, 1: certain)", ylabel="particles", title=title)
    axes.legend()
    return png_of(figure)


def particles_figure(images: NDArray[np.floating], mean: NDArray[np.floating]) -> bytes:
    """Images (n, y, x) above the same smoothed, and the mean of many (y, x) beside them."""
    count = max(len(images), 1)
    figure = Figure(figsize=(1.3 * (count + 1) + 0.5, 3.1), layout="constrained")
    grid = figure.subplots(2, count + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    smoothed = [_smoothed(image) for image in images]
    for row, stack in zip(grid, ([*images, mean], [*smoothed, _smoothed(mean)]), strict=True):
        for axes, image in zip(row, stack, strict=False):
            low, high = np.percentile(image, [0.5, 99.5])
            axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower")
    grid[0, -1].set_title("mean", fontsize="small")
    return png_of(figure)
