"""What a report shows of continuous variety: scree, correlation of the halves, the latent space."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.evaluate.mixture import Mixture
from scalecryo.evaluate.report import Section, Surface, fsc_figure
from scalecryo.evaluate.report.figure import film_of_pixels, png_of

MOST_SHOWN = 5000
FILM_STEPS, FILM_SIZE, FILM_SECONDS = 7, 128, 2.0  # positions, pixels across each side, there and back
SIGNAL = 0.143


@dataclass(frozen=True)
class ComponentCurves:
    """What is known of each of q components.

    Attributes:
        variance: of the map's voxels along it, summed.
        gain: in log-likelihood per image, of images that the component was made without.
        error: its standard error.
        fsc: between the halves' components.
        passing: number of them that are confirmed.
        box_size: px, of the shells.
        pixel_size: Å.
        encoder: of each passing component how the encoder's coordinates correlate with the exact ones, and their root
            mean square error over the spread; None: there is no encoder.
    """

    variance: Float[NDArray, " q"]
    gain: Float[NDArray, " q"]
    error: Float[NDArray, " q"]
    fsc: Float[NDArray, "q shells"]
    passing: int
    box_size: int
    pixel_size: float
    encoder: tuple[Float[NDArray, " p"], Float[NDArray, " p"]] | None = None

    @property
    def verdict(self) -> str:
        """Where to stop, in words."""
        count = len(self.variance)
        if self.passing == 0:
            return "no component passes: the particles show one structure, as far as these data tell"
        where = "all of them pass: there may be more" if self.passing == count else f"stop after {self.passing}"
        return f"{self.passing} of {count} components pass: {where}"

    def resolution(self, number: int) -> float | None:
        """Å to which the halves agree on a component, from 0; None: nowhere."""
        below = np.flatnonzero(self.fsc[number][1:] < SIGNAL)
        shell = int(below[0]) if len(below) else self.fsc.shape[1] - 1
        return self.box_size * self.pixel_size / shell if shell else None

    def text(self) -> str:
        """The verdict and a line for each component."""
        total = self.variance.sum() or 1.0
        lines = [self.verdict]
        for number, (variance, gain, error) in enumerate(zip(self.variance, self.gain, self.error, strict=True), 1):
            angstrom = self.resolution(number - 1)
            reach = "nowhere" if angstrom is None else f"{angstrom:.1f} Å"
            lines.append(
                f"component {number}: {100 * variance / total:.1f} % of what the components explain; halves agree "
                f"(FSC {SIGNAL}) to {reach}; log-likelihood per image never seen {gain:+.2f} ± {error:.2f}"
            )
        if self.encoder is not None:
            correlation, error = (" ".join(f"{value:.2f}" for value in values) for values in self.encoder)
            lines.append(
                f"the encoder's coordinates of particles that it has not learnt from correlate by {correlation} with "
                f"the exact ones, with an error of {error} of their spread"
            )
        return "\n".join(lines)


def component_sections(
    curves: ComponentCurves,
    z: Float[NDArray, "particles q"],
    mixture: Mixture | None,
    state: Int[NDArray, " particles"] | None,
    summaries: Sequence[str] = (),
) -> list[Section]:
    """The report's sections on variety.

    Args:
        curves: of the components.
        z: coordinates of all particles.
        mixture: states; None where no component passes.
        state: of each particle, from 1.
        summaries: a line for each state.
    """
    named = {f"component {number}": curve for number, curve in enumerate(curves.fsc, 1)}
    found = [
        Section("Continuous variety", curves.text(), scree_figure(curves), name="scree"),
        Section("Continuous variety: correlation of the halves", name="components_fsc",
                png=fsc_figure(named, curves.box_size, curves.pixel_size, (SIGNAL,), "Components")),
    ]  # fmt: skip
    if curves.passing:
        text = "" if mixture is None else f"{len(mixture)} states by BIC\n" + "\n".join(summaries)
        picture = latent_figure(z, curves.passing, mixture, state)
        found.append(Section("Latent space", text, picture, name="latent"))
    return found


def scree_figure(curves: ComponentCurves) -> bytes:
    """Variance and gain of each component; those that pass are filled."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = np.arange(1, len(curves.variance) + 1)
    colour = ["tab:blue" if k <= curves.passing else "0.75" for k in number]
    left.bar(number, curves.variance / (curves.variance.sum() or 1.0), color=colour)
    left.set(xlabel="component", ylabel="share of the variance", xticks=number)
    right.bar(number, curves.gain, yerr=curves.error, color=colour, capsize=3)
    right.axhline(0, color="0.4", linewidth=0.9)
    right.set(xlabel="component", ylabel="gain per image never seen", xticks=number)
    figure.suptitle(curves.verdict.partition(":")[0])
    return png_of(figure)


def traversal_figure(
    mean: Float[NDArray, "n n n"], components: Float[NDArray, "q n n n"], places: Sequence[float]
) -> bytes:
    """Projections along z of the mean moved along each component, one component a row, to so many deviations."""
    figure = Figure(figsize=(1.5 * len(places) + 0.4, 1.6 * len(components) + 0.3), layout="constrained")
    grid = figure.subplots(len(components), len(places), squeeze=False)
    along, base = components.sum(1), mean.sum(0)
    low, high = np.percentile(base, [1, 99.9])
    for number, row in enumerate(grid):
        for axes, place in zip(row, places, strict=True):
            axes.imshow(
                base + place * along[number], cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower"
            )
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title(f"{place:+g} sd", fontsize="small")
        row[0].set_ylabel(f"component {number + 1}", fontsize="small")
    return png_of(figure)


def traversal_film(
    mean: Float[Tensor, "n n n"],
    component: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"],
    pixel_size: float,
    angstrom: float,
    reach: float,
) -> bytes:
    """The surface from three sides as it moves along a component and back, as bytes of an animated PNG.

    Args:
        mean: of all particles.
        component: times the standard deviation of its coordinate.
        mask: around both.
        pixel_size: Å.
        angstrom: resolution that both are low-passed to: what is finer is noise that a film would show as motion.
        reach: standard deviations that it goes to either way.
    """
    # All that makes a surface's density of a map is linear: of mean and component once, then frames are their sums.
    still, moving = (Surface.of_map(volume, mask, pixel_size, FILM_SIZE, angstrom) for volume in (mean, component))
    places = np.linspace(-reach, reach, FILM_STEPS).tolist()
    there = [replace(still, density=still.density + place * moving.density).picture(FILM_SIZE) for place in places]
    return film_of_pixels([*there, *there[-2:0:-1]], FILM_SECONDS)


def latent_figure(
    z: Float[NDArray, "particles q"], passing: int, mixture: Mixture | None, state: Int[NDArray, " particles"] | None
) -> bytes:
    """Scatter of some particles and density of all along the first two coordinates; one is drawn as a histogram."""
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    if passing == 1 or z.shape[1] == 1:
        axes = figure.add_subplot()
        axes.hist(z[:, 0], bins=80, color="tab:blue")
        axes.set(xlabel="component 1 (standard deviations)", ylabel="particles")
        return png_of(figure)
    left, right = figure.subplots(1, 2)
    some = slice(None, None, max(1, len(z) // MOST_SHOWN))
    colour = "tab:blue" if state is None else state[some]
    left.scatter(z[some, 0], z[some, 1], c=colour, s=3, linewidths=0, cmap="tab20")
    if mixture is not None and mixture.mean.shape[1] > 1:
        for number, mean in enumerate(mixture.mean, 1):
            left.annotate(str(number), mean[:2], weight="bold", ha="center", va="center")
    limits = np.percentile(z[:, :2], [0.5, 99.5], axis=0).T
    right.hist2d(z[:, 0], z[:, 1], bins=70, range=limits, cmap="viridis")
    for axes in (left, right):
        axes.set(xlabel="component 1 (standard deviations)", ylabel="component 2")
    return png_of(figure)
