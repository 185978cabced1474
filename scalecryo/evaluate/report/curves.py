"""Curves: Fourier shell correlations, and what was recorded while training."""

from collections.abc import Mapping, Sequence
from functools import partial
from operator import mul

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from scalecryo.evaluate.report.figure import png_of
from scalecryo.physics.fsc import resolution


def fsc_figure(
    curves: Mapping[str, NDArray[np.floating]],
    box_size: int,
    pixel_size: float,
    thresholds: Sequence[float] = (0.5, 0.143),
    title: str = "Fourier shell correlation",
) -> bytes:
    """Curves on integer shells (DC first) against spatial frequency, with thresholds, crossings and Nyquist drawn.

    Where the last curve first falls below a threshold is marked with its resolution. `pixel_size` in Å; shell s is the
    frequency s / (box_size · pixel_size).
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
        # Beside the axes: within them a crossing's resolution may stand.
        label = axes.text(1.005, threshold, f"{threshold:g}", color="0.35", va="center")
        label.set_transform(axes.get_yaxis_transform())
    nyquist = 0.5 / pixel_size
    axes.axvline(nyquist, color="tab:red", linewidth=1.0, linestyle=":")
    axes.text(nyquist, 0.75, f" Nyquist\n {1 / nyquist:.3g} Å", color="tab:red", fontsize="small")
    if curves:
        _mark_crossings(axes, list(curves.values())[-1], box_size, pixel_size, thresholds)
    axes.set(xlim=(0, 1.12 * nyquist), ylim=(min(-0.05, _lowest(curves)), 1.03), ylabel="correlation", title=title)
    axes.set_xlabel("resolution (Å)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1 / s:.2g}" if s > 0 else "∞"))
    shell_axis = axes.secondary_xaxis("top", functions=(partial(mul, length), partial(mul, 1 / length)))
    shell_axis.set_xlabel("Fourier shell (cycles per box)", fontsize="small")
    shell_axis.tick_params(labelsize="small")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize="small")
    return png_of(figure)


def _mark_crossings(
    axes: Axes, curve: NDArray[np.floating], box_size: int, pixel_size: float, thresholds: Sequence[float]
) -> None:
    """A dot and its resolution where a curve falls below each threshold before Nyquist."""
    for threshold in thresholds:
        if not bool((np.asarray(curve)[1 : box_size // 2] < threshold).any()):
            continue
        _, angstrom = resolution(np.asarray(curve).tolist(), box_size, pixel_size, threshold)
        axes.plot([1 / angstrom], [threshold], "o", color="black", markersize=5, zorder=5)
        axes.annotate(f"{angstrom:.2f} Å", (1 / angstrom, threshold), (6, 6), textcoords="offset points")


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
    return png_of(figure)


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
