"""What continuous variety leaves in a run: components, traversals, coordinates, states and maps. Worker 0 only."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.formats import mrc, relion
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.components import ComponentCurves, component_sections, traversal_figure
from scalecryo.evaluate.mixture import Mixture
from scalecryo.evaluate.report import Section, fsc_figure, with_sections
from scalecryo.map.postprocess import postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fsc import resolution
from scalecryo.runs.class_results import fsc_table, write_maps
from scalecryo.runs.folder import RunFolder

FOLDER = "components"
STEPS, REACH = 9, 2.0  # maps of a traversal, and how far it goes, in standard deviations
SIGNAL = 0.143


@dataclass(frozen=True)
class Variety:
    """What was learnt.

    Attributes:
        mean: of all particles.
        components: times the standard deviation of their coordinate.
        curves: what is known of the components.
        z: coordinates of all particles, by row of the store.
        sd: their standard deviations.
        mixture: states among the passing components; None where none passes.
        maps: half-maps of every state; None where there are none.
    """

    mean: Float[Tensor, "n n n"]
    components: Float[Tensor, "q n n n"]
    curves: ComponentCurves
    z: Float[NDArray, "particles q"]
    sd: Float[NDArray, "particles q"]
    mixture: Mixture | None
    maps: ReferenceSet | None

    def states(self) -> tuple[Int[NDArray, " particles"], Float[NDArray, " particles"]] | None:
        """State of each particle, from 1, and its probability."""
        if self.mixture is None:
            return None
        probability = self.mixture.probability(self.z[:, : self.curves.passing])
        return probability.argmax(1) + 1, probability.max(1)


def write_variety(run: RunFolder, store: ParticleStore, variety: Variety, seed: int) -> None:
    """Write components/, states/, the columns of particles.star and the report's sections."""
    urls.make_folder(run.path(FOLDER))
    _write_volumes(run, variety)
    states = variety.states()
    table = {name: _array(values) for name, values in _columns(variety, states).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, z=variety.z, sd=variety.sd)
    run.write(f"{FOLDER}/z.npz", buffer.getvalue())
    # The table's rows are in the order of the source's.
    order = np.argsort(store.table().columns["source_row"], kind="stable")
    relion.add_columns(run.path("particles.star"), {name: values[order] for name, values in table.items()})
    summaries, more = _write_states(run, variety, states, seed)
    label = None if states is None else states[0]
    places = np.linspace(-REACH, REACH, STEPS)[::2].tolist()
    film = traversal_figure(_array(variety.mean), _array(variety.components), places)
    sections = component_sections(variety.curves, variety.z, variety.mixture, label, summaries) + more
    sections.append(Section("Along each component", png=film, name="traversals"))
    for section in sections:
        if section.png is not None and section.name:
            run.write(f"{section.name}.png", section.png)
    if urls.exists(run.path("report.html")):
        page = with_sections(urls.read_text(run.path("report.html")), sections)
        run.write("report.html", page.encode())


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


def _columns(variety: Variety, states: tuple[NDArray, NDArray] | None) -> dict[str, NDArray]:
    """Columns of particles.star."""
    columns: dict[str, NDArray] = {}
    for number in range(variety.z.shape[1]):
        columns[f"{relion.COMPONENT}{number + 1}"] = variety.z[:, number].astype(np.float64)
    for number in range(variety.z.shape[1]):
        columns[f"{relion.COMPONENT}Sd{number + 1}"] = variety.sd[:, number].astype(np.float64)
    if states is not None:
        columns |= {relion.STATE: states[0].astype(np.int64), relion.STATE_PROBABILITY: states[1].astype(np.float64)}
    return columns


def _write_states(
    run: RunFolder, variety: Variety, states: tuple[NDArray, NDArray] | None, seed: int
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
