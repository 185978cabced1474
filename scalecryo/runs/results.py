"""What a finished run leaves behind: maps, curves, the particle table and the report. Worker 0 only."""

import torch
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.formats import csrows, mrc, relion
from scalecryo.data.formats.translate import Extra, relion_extra
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.cones import ConicalFsc, cone_directions, cone_fsc
from scalecryo.map.postprocess import FinalMap, freed_of_mask, postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.aberrations import recorded_shift
from scalecryo.physics.fsc import resolution
from scalecryo.physics.rotation import rotation_to_euler
from scalecryo.runs.class_results import ClassSummary, fsc_table, write_classes, write_maps
from scalecryo.runs.final_results import FinalParticles, FinalResults, as_numpy
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.projector import shown_rows, write_points
from scalecryo.runs.report import write_report


def write_results(
    config: Config,
    store: ParticleStore,
    run: RunFolder,
    particles: FinalParticles,
    maps: ReferenceSet,
    learned: Tensor | None = None,
) -> FinalResults:
    """Write maps, particles.star, fsc.csv, fsc_cones.csv, pictures and report.html; volume.mrc where one was learnt."""
    generator = torch.Generator().manual_seed(config.train.seed)
    final = postprocess(maps, generator)
    write_maps(run, "", maps, final)
    if learned is not None:
        mrc.write_map(run.path("volume.mrc"), as_numpy(learned), store.level_pixel_size(learned.shape[-1]))
    table, shift = store.table(), particles.poses.shift.cpu()
    if store.has_aberrations:  # poses are of images without them, the table's origins of images as recorded
        shift = recorded_shift(shift, torch.from_numpy(table.columns["magnification"]))
    cs = store.source_cs()
    own = None if cs is None else csrows.decode(cs, store.url)[table.columns["source_row"]]
    extra = Extra({}, {}, ()) if own is None else relion_extra(own)
    relion.write_with_poses(
        run.path("particles.star"),
        store.source_star(),
        table,
        rotation=as_numpy(particles.poses.rotation),
        shift=as_numpy(shift),
        confidence=as_numpy(particles.confidence),
        half=as_numpy(particles.half),
        box_size=int(store.attrs["source_box_size"]),
        more=extra.columns,
        more_optics=extra.optics,
        classes=particles.classes if maps.classes > 1 else None,
    )
    cones = _cones(maps, final)
    run.write("fsc.csv", fsc_table(maps, final).encode())
    run.write("fsc_cones.csv", cones.table().encode())
    finals: list[FinalMap] = [final]
    classes: list[ClassSummary] = []
    if maps.classes > 1:
        finals, classes = write_classes(run, particles.poses, maps, final, generator)
    _write_projector(run, particles, many=maps.classes > 1)
    results = FinalResults(config, store, run, particles, maps, finals, cones, classes)
    write_report(results)
    return results


def _write_projector(run: RunFolder, particles: FinalParticles, *, many: bool) -> None:
    """Views for TensorBoard's projector: on the unit sphere, with the angle of the image's turn in its plane."""
    some = shown_rows(len(particles.half))
    rotation = particles.poses.rotation[torch.from_numpy(some)]
    labels = {
        "row": some,
        "confidence": as_numpy(particles.confidence)[some],
        "half": as_numpy(particles.half)[some],
        "in_plane_deg": as_numpy(rotation_to_euler(rotation))[:, 2],
    }
    if many:
        labels |= {"class": particles.classes[0][some], "class_probability": particles.classes[1][some]}
    write_points(run, "views", as_numpy(rotation)[:, :, 2], labels)


def _cones(maps: ReferenceSet, final: FinalMap) -> ConicalFsc:
    """The half-maps' masked correlation by direction, freed of the mask's share as the whole shells' is."""
    directions, (first, second) = cone_directions(), maps.maps[0] * maps.mask[0]
    curves = freed_of_mask(cone_fsc(first, second, directions), final.fsc_random, final.random_from)
    _, angstrom = resolution(final.fsc_corrected, maps.level, maps.pixel_size, 0.143)
    return ConicalFsc(directions.to(curves), curves, maps.level, maps.pixel_size, angstrom)
