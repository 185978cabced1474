"""What a finished run leaves behind: maps, curves, the particle table and the report. Worker 0 only."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.formats import csrows, mrc, relion
from scalecryo.data.formats.translate import Extra, relion_extra
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.cones import ConicalFsc, cone_directions, cone_fsc
from scalecryo.evaluate.report import (
    Section,
    cones_figure,
    confidence_figure,
    fsc_figure,
    orientation_figure,
    projections_figure,
    report_html,
    slices_figure,
    training_figure,
)
from scalecryo.map.postprocess import FinalMap, freed_of_mask, postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.aberrations import recorded_shift
from scalecryo.physics.fsc import resolution
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.symmetry import PointGroup
from scalecryo.runs.class_results import fsc_table, write_classes, write_maps
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.pictures import Pairs
from scalecryo.settings import POSED

MOST_VIEWS = 200_000  # related poses that the picture of orientations counts
PANELS = {
    "halves/resolution_angstrom": "half-maps agree to (Å)",
    "iteration/radius": "refined to (Fourier px)",
    "iteration/moved_share": "share of particles that moved far",
    "pass_seconds": "seconds",
    "loss": "loss",
    "images_per_second": "images / s",
    "pose_spread": "pose spread",
    "truth/rotation_error_median_deg": "rotation error, median (°)",
    "truth/fsc_0.5_shell": "FSC 0.5 to truth (shell)",
}


@dataclass(frozen=True)
class FinalParticles:
    """Every particle, by row of the store.

    Attributes:
        poses: that the final pass found.
        half: 1 or 2.
        pairs: a few images and their predictions, or None.
        notes: what a person should know of the halves and of the start.
    """

    poses: PoseEstimates
    half: Int[Tensor, " n"]
    pairs: Pairs | None
    notes: tuple[str, ...] = ()

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """Probability that the image shows the particle, in this pose and not in another mode."""
        return self.poses.confidence * self.poses.particle_probability

    @property
    def classes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Class of each, from 1, and its probability."""
        return _numpy(self.poses.class_index) + 1, _numpy(self.poses.class_probability)


def write_results(
    config: Config,
    store: ParticleStore,
    run: RunFolder,
    particles: FinalParticles,
    maps: ReferenceSet,
    learned: Tensor | None = None,
) -> ConicalFsc:
    """Write maps, particles.star, fsc.csv, fsc_cones.csv, pictures and report.html; volume.mrc where one was learnt.

    Returns the correlation of the final half-maps by direction.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    final = postprocess(maps, generator)
    write_maps(run, "", maps, final)
    if learned is not None:
        mrc.write_map(run.path("volume.mrc"), _numpy(learned), store.level_pixel_size(learned.shape[-1]))
    table, shift = store.table(), particles.poses.shift.cpu()
    if store.has_aberrations:  # poses are of images without them, the table's origins of images as recorded
        shift = recorded_shift(shift, torch.from_numpy(table.columns["magnification"]))
    table, cs = store.table(), store.source_cs()
    own = None if cs is None else csrows.decode(cs, store.url)[table.columns["source_row"]]
    extra = Extra({}, {}, ()) if own is None else relion_extra(own)
    relion.write_with_poses(
        run.path("particles.star"),
        store.source_star(),
        table,
        rotation=_numpy(particles.poses.rotation),
        shift=_numpy(shift),
        confidence=_numpy(particles.confidence),
        half=_numpy(particles.half),
        box_size=int(store.attrs["source_box_size"]),
        more=extra.columns,
        more_optics=extra.optics,
        classes=particles.classes if maps.classes > 1 else None,
    )
    cones = _cones(maps, final)
    run.write("fsc.csv", fsc_table(maps, final).encode())
    run.write("fsc_cones.csv", cones.table().encode())
    sections = _sections(config, store, run, particles, maps, final, cones)
    for section, name in sections:
        if section.png is not None:
            run.write(f"{name}.png", section.png)
    if maps.classes > 1:
        sections[1:1] = write_classes(run, particles.poses, maps, final, generator)
    title = f"scalecryo: {store.count} particles, {store.box_size} px, {store.pixel_size:g} Å/px"
    run.write("report.html", report_html(title, [section for section, _ in sections]).encode())
    return cones


def _cones(maps: ReferenceSet, final: FinalMap) -> ConicalFsc:
    """The half-maps' masked correlation by direction, freed of the mask's share as the whole shells' is."""
    directions, (first, second) = cone_directions(), maps.maps[0] * maps.mask[0]
    curves = freed_of_mask(cone_fsc(first, second, directions), final.fsc_random, final.random_from)
    _, angstrom = resolution(final.fsc_corrected, maps.level, maps.pixel_size, 0.143)
    return ConicalFsc(directions.to(curves), curves, maps.level, maps.pixel_size, angstrom)


def _sections(
    config: Config,
    store: ParticleStore,
    run: RunFolder,
    particles: FinalParticles,
    maps: ReferenceSet,
    final: FinalMap,
    cones: ConicalFsc,
) -> list[tuple[Section, str]]:
    """The report's parts, each with the name of its picture."""
    box, pixel_size = store.box_size, store.pixel_size
    curves = {
        "half-maps": _numpy(maps.fsc[0]),
        "masked": _numpy(maps.fsc_masked[0]),
        "masked, phases randomised": _numpy(final.fsc_random),
        "masked, corrected": _numpy(final.fsc_corrected),
    }
    shell, angstrom = resolution(final.fsc_corrected, box, pixel_size, 0.143)
    summary = (
        f"pose source: {config.pose.source}\n"
        f"half-maps agree (FSC 0.143, masked, corrected) to shell {shell:.1f} of {box // 2}, {angstrom:.2f} Å\n"
        f"phases randomised from shell {final.random_from}; B-factor undone: {final.b_factor:.0f} Å²\n"
        f"map: mean of the halves, weighted by their correlation, at {pixel_size:g} Å/px\n"
        + (
            "Both halves began with one map of low resolution (12 Fourier pixels); since then each was posed against "
            "its own: beyond that shell the curve is a gold standard."
            if config.recipe == "guided"
            else "Each half was posed against its own map, made with the poses that came with the particles."
            if config.recipe == "poses"
            else "Each half was posed against its own map, from candidates of one encoder; at low frequencies both "
            "halves shared one map while it learnt."
            if config.recipe == "autoencoder"
            else "Both halves were posed by one model, so this curve is optimistic: it measures noise, not wrong poses."
        )
        + _symmetry_told(config)
        + "".join(f"\n{note[0].upper()}{note[1:]}." for note in particles.notes)
    )
    examples = [_numpy(images) for images in particles.pairs or (torch.zeros(0, 1, 1), torch.zeros(0, 1, 1))]
    planes = {"map": _numpy(final.map), "mask": _numpy(maps.mask[0])}
    steps, panels = _training_curves(run)
    label = "iteration" if config.pose.source == "guided" else "step"
    parts = [
        (Section("Summary", summary), ""),
        (Section("Fourier shell correlation", png=fsc_figure(curves, box, pixel_size)), "fsc"),
        (Section("Map", png=slices_figure(planes, pixel_size)), "slices"),
        (Section("Particles and predictions", png=projections_figure(examples[0], examples[1])), "projections"),
        (Section("Orientations", png=orientation_figure(_views(config, particles.poses))), "orientations"),
        (Section("Resolution by direction", cones.text, cones_figure(cones, _numpy(final.fsc_corrected))), "fsc_cones"),
        (Section("Confidence", png=confidence_figure(_numpy(particles.confidence))), "confidence"),
    ]
    if panels:
        parts.append((Section("Training", png=training_figure(steps, panels, x_label=label)), "training"))
    return parts


def _symmetry_told(config: Config) -> str:
    group = config.train.symmetry.strip().upper()
    if config.recipe not in POSED or group == "C1":
        return ""
    return (
        f"\nSymmetry {group}, axes as RELION's: sums are symmetrised, so the curves are of symmetric half-maps; poses "
        "are known modulo the group."
    )


def _views(config: Config, poses: PoseEstimates) -> NDArray:
    """Rotations in all related poses, of a point group's; of as many particles as that figure needs."""
    if config.recipe not in POSED or len(group := PointGroup.of(config.train.symmetry)) == 1:
        return _numpy(poses.rotation)
    some = poses.rotation[:: max(1, len(poses) * len(group) // MOST_VIEWS)].cpu()
    return _numpy((group.rotations[:, None] @ some).flatten(0, 1))


def _training_curves(run: RunFolder) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Steps and curves out of metrics.jsonl; empty where the run has none (an assignment written elsewhere)."""
    path = run.local / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = np.array(sorted({row["step"] for row in rows}), dtype=np.int64)
    panels = {}
    for key, label in PANELS.items():
        values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        if values:
            panels[label] = np.array([values.get(int(step), np.nan) for step in steps], dtype=np.float64)
    return steps, panels


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
