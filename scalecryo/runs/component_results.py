"""What continuous variety leaves in a run: components, traversals, coordinates, states and maps. Worker 0 only."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.formats import mrc, relion
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.components import (
    ComponentCurves,
    component_sections,
    latent_figure,
    traversal_figure,
    traversal_film,
)
from scalecryo.evaluate.mixture import Mixture
from scalecryo.evaluate.report import Section, Surface, fsc_figure, with_sections
from scalecryo.map.postprocess import postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.aberrations import recorded_shift
from scalecryo.physics.fsc import resolution
from scalecryo.physics.poses import Poses
from scalecryo.runs.class_results import fsc_table, write_maps
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.projector import write_points

FOLDER = "components"
STEPS, REACH = 9, 2.0  # maps of a traversal, and how far it goes, in standard deviations
FILMS, LEAST_SHELL = 6, 4  # components that are shown as films; shell that one shows at least
SIGNAL = 0.143
_STATES = "states.npz"
_MIXTURE = ("share", "mean", "covariance", "log_likelihood", "bic")
Labels = tuple[Int[NDArray, " particles"], Float[NDArray, " particles"]]
"""State of each particle, from 1, and its probability."""


@dataclass(frozen=True)
class Variety:
    """What was learnt.

    Attributes:
        mean: of all particles.
        components: times the standard deviation of their coordinate.
        mask: that components are cut to.
        confidence: of each particle, by row of the store.
        curves: what is known of the components.
        z: coordinates of all particles, by row of the store.
        sd: their standard deviations.
        mixture: states among the passing components; None where none passes.
        maps: half-maps of every state; None where there are none.
        poses: of all particles, where they were refined with the components; else None.
    """

    mean: Float[Tensor, "n n n"]
    components: Float[Tensor, "q n n n"]
    mask: Float[Tensor, "n n n"]
    confidence: Float[NDArray, " particles"]
    curves: ComponentCurves
    z: Float[NDArray, "particles q"]
    sd: Float[NDArray, "particles q"]
    mixture: Mixture | None
    maps: ReferenceSet | None
    poses: Poses | None = None

    @property
    def states(self) -> "States":
        """What tells a particle's state from its coordinates."""
        return States(self.curves.passing, self.mixture)


@dataclass(frozen=True)
class States:
    """What tells a particle's state from its coordinates.

    Attributes:
        passing: number of components that are confirmed.
        mixture: states among them; None where none is.
    """

    passing: int
    mixture: Mixture | None

    def of(self, z: Float[NDArray, "particles q"]) -> Labels | None:
        """State of each particle, from 1, and its probability; None where there are none."""
        if self.mixture is None:
            return None
        state, probability = self.mixture.likeliest(z[:, : self.passing])
        return state + 1, probability

    def write(self, run: RunFolder) -> None:
        """Into the run's folder."""
        mixture, buffer = self.mixture, io.BytesIO()
        held = {} if mixture is None else {name: getattr(mixture, name) for name in _MIXTURE}
        np.savez(buffer, allow_pickle=False, passing=np.array(self.passing), **held)
        run.write(f"{FOLDER}/{_STATES}", buffer.getvalue())

    @classmethod
    def of_run(cls, run: RunFolder) -> "States":
        """From a run's folder; none of one that has not written any."""
        if not urls.exists(run.path(FOLDER, _STATES)):
            return cls(0, None)
        with np.load(io.BytesIO(urls.read_bytes(run.path(FOLDER, _STATES))), allow_pickle=False) as held:
            if "mean" not in held:
                return cls(int(held["passing"]), None)
            share, mean, covariance, likelihood, bic = (held[name] for name in _MIXTURE)
            return cls(int(held["passing"]), Mixture(share, mean, covariance, float(likelihood), float(bic)))


def write_variety(run: RunFolder, store: ParticleStore, variety: Variety, seed: int) -> None:
    """Write components/, states/, the columns of particles.star and the report's sections."""
    urls.make_folder(run.path(FOLDER))
    _write_volumes(run, variety)
    states = variety.states.of(variety.z)
    variety.states.write(run)
    _write_coordinates(run, store, variety.z, variety.sd, states, variety.poses)
    summaries, more = _write_states(run, variety, states, seed)
    label = None if states is None else states[0]
    places = np.linspace(-REACH, REACH, STEPS)[::2].tolist()
    projections = traversal_figure(_array(variety.mean), _array(variety.components), places)
    sections = component_sections(variety.curves, variety.z, variety.mixture, label, summaries) + more
    sections.append(Section("Along each component", png=projections, name="traversals"))
    _add_sections(run, sections + _films(variety))
    _write_projector(run, variety.z, variety.confidence, states)


def write_placed(
    run: RunFolder,
    store: ParticleStore,
    z: Float[NDArray, "particles q"],
    sd: Float[NDArray, "particles q"],
    known: States,
    poses: Poses | None,
) -> None:
    """Write what particles are in a model that others were learnt from: columns of the table, z.npz, a section.

    Args:
        run: folder of the assignment.
        store: of the particles.
        z: coordinates, by row of the store.
        sd: their standard deviations.
        known: states of the run that learnt the model.
        poses: of the particles, where they were refined with the components; else None.
    """  # fmt: skip
    urls.make_folder(run.path(FOLDER))
    states = known.of(z)
    _write_coordinates(run, store, z, sd, states, poses)
    if states is None or known.mixture is None:
        return
    label, count = states[0], len(known.mixture)
    held = np.bincount(label, minlength=count + 1)[1:]
    told = "\n".join(f"state {k}: {n:,} particles ({n / len(z):.1%})" for k, n in enumerate(held.tolist(), 1))
    picture = latent_figure(z, known.passing, known.mixture, label)
    _add_sections(run, [Section("Latent space of the run's components", told, picture, name="latent")])


def _films(variety: Variety) -> list[Section]:
    """What moves along each component that passes; the first few."""
    curves, found = variety.curves, []
    for number, component in enumerate(variety.components[: min(curves.passing, FILMS)], 1):
        angstrom = curves.resolution(number - 1) or curves.box_size * curves.pixel_size / LEAST_SHELL
        film = traversal_film(variety.mean, component, variety.mask, curves.pixel_size, angstrom, REACH)
        told = f"From −{REACH:g} to {REACH:g} standard deviations and back: {', '.join(Surface.SIDES)}"
        found.append(Section(f"Film along component {number}", png=film, caption=told, name=f"film{number}"))
    return found


def _write_projector(run: RunFolder, z: NDArray, confidence: NDArray, states: Labels | None) -> None:
    """Coordinates for TensorBoard's projector."""
    count = len(z)
    labels = {"row": np.arange(count), "confidence": confidence}
    if states is not None:
        labels |= {"state": states[0], "state_probability": states[1]}
    write_points(run, "components", z, labels)


def _add_sections(run: RunFolder, sections: Sequence[Section]) -> None:
    for section in sections:
        if section.png is not None and section.name:
            run.write(f"{section.name}.png", section.png)
    if urls.exists(run.path("report.html")):
        page = with_sections(urls.read_text(run.path("report.html")), sections)
        run.write("report.html", page.encode())


def _write_coordinates(
    run: RunFolder, store: ParticleStore, z: NDArray, sd: NDArray, states: Labels | None, poses: Poses | None
) -> None:
    """components/z.npz and the columns of particles.star."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, z=z, sd=sd)
    run.write(f"{FOLDER}/z.npz", buffer.getvalue())
    # The table's rows are in the order of the source's.
    table = store.table().columns
    order = np.argsort(table["source_row"], kind="stable")
    columns = {name: values[order] for name, values in _columns(z, sd, states).items()}
    posed = None
    if poses is not None:
        shift = poses.shift.cpu()
        if store.has_aberrations:  # the table's origins are of images as recorded
            shift = recorded_shift(shift, torch.from_numpy(table["magnification"]))
        posed = _array(poses.rotation)[order], _array(shift)[order]
    relion.add_columns(run.path("particles.star"), columns, posed)


def _write_volumes(run: RunFolder, variety: Variety) -> None:
    """mean.mrc, component1.mrc …, and a series of maps along each."""
    size = variety.curves.pixel_size
    mrc.write_map(run.path(FOLDER, "mean.mrc"), _array(variety.mean), size)
    for number, component in enumerate(variety.components, 1):
        mrc.write_map(run.path(FOLDER, f"component{number}.mrc"), _array(component), size)
        folder = f"{FOLDER}/traversal{number}"
        urls.make_folder(run.path(folder))
        for step, place in enumerate(np.linspace(-REACH, REACH, STEPS).tolist(), 1):
            mrc.write_map(run.path(folder, f"{step:02d}.mrc"), _array(variety.mean + place * component), size)


def _columns(z: NDArray, sd: NDArray, states: Labels | None) -> dict[str, NDArray]:
    """Columns of particles.star. Where there are components there is one class, so that the state can be RELION's."""
    columns: dict[str, NDArray] = {}
    for number, values in enumerate(z.T, 1):
        columns[f"{relion.COMPONENT}{number}"] = values.astype(np.float64)
    for number, values in enumerate(sd.T, 1):
        columns[f"{relion.COMPONENT}Sd{number}"] = values.astype(np.float64)
    if states is not None:
        label = states[0].astype(np.int64)
        columns |= {relion.CLASS: label, relion.STATE: label, relion.STATE_PROBABILITY: states[1].astype(np.float64)}
    return columns


def _write_states(
    run: RunFolder, variety: Variety, states: Labels | None, seed: int
) -> tuple[list[str], list[Section]]:
    """The folders states/state1 …; returns a line for each and the report's curves."""
    maps = variety.maps
    if maps is None or states is None:
        return [], []
    summaries, curves, generator = [], {}, torch.Generator().manual_seed(seed)
    for number in range(maps.classes):
        folder, final = f"states/state{number + 1}", postprocess(maps, generator, number)
        write_maps(run, folder, maps, final, number)
        run.write(f"{folder}/fsc.csv", fsc_table(maps, final, number).encode())
        curves[f"state {number + 1}"] = _array(final.fsc_corrected)
        _, angstrom = resolution(final.fsc_corrected, maps.level, maps.pixel_size, SIGNAL)
        held = int((states[0] == number + 1).sum())
        summaries.append(f"state {number + 1}: {held:,} particles ({held / len(variety.z):.1%}), to {angstrom:.2f} Å")
    png = fsc_figure(curves, maps.level, maps.pixel_size, (SIGNAL,), "States")
    return summaries, [Section("States: correlation of the halves", png=png, name="states_fsc")]


def _array(values: Tensor | NDArray) -> NDArray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
