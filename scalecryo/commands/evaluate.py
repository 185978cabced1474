"""`scalecryo evaluate`: a run, a table or a map against a known truth: one line of JSON, two pictures, a sentence."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from scalecryo.commands.console import note, say
from scalecryo.commands.evaluate_reference import compare_with_reference, is_reference
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import CLASS, CLASS_PROBABILITY, JUNK, OwnColumns, StarPoses, image_key, read_poses
from scalecryo.data.io import urls
from scalecryo.errors import InputError, MissingInputError
from scalecryo.evaluate.align_maps import rotational_symmetry
from scalecryo.evaluate.classes import ClassComparison, compare_classes
from scalecryo.evaluate.compare import (
    MapComparison,
    PoseComparison,
    compare_maps,
    compare_poses,
    sentence,
    summary,
)
from scalecryo.evaluate.metrics import junk_auc
from scalecryo.evaluate.report import fsc_figure, slices_figure
from scalecryo.evaluate.symmetry_axes import symmetry_axes
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.symmetry import PointGroup
from scalecryo.runs.folder import RunFolder

_AXES_RADIUS, _AGREES = 24.0, 0.9  # Fourier pixels that the true map's axes are found with, and its least agreement

LEAST_OF_CLASS = 20  # particles of a class whose poses are compared


def run(path: str, *, truth: str, symmetry: str | None = None) -> dict[str, Any]:
    """Print one JSON line (null where a number does not apply), and return what it says.

    A map also gives evaluate_fsc.png, evaluate_fsc.csv and evaluate_slices.png beside it. What it comes to is said in
    a sentence on standard error.

    `truth` is a folder with truth.star and truth.mrc, or a single map or structure of any box, pixel size and
    orientation, with which the map alone is compared.

    Poses are aligned on the even rows and scored on the odd ones, maps over all rotations or from the poses, both in
    either hand. The FSC is taken without a mask. Images that truth.star calls junk have no pose to be compared: they
    are left out, and `junk_auc` says how well the table's confidence tells them from particles. With a point group
    (`symmetry`, else the run's own) rotations are compared modulo its rotations about their axes in the true map.
    """
    is_table, is_map = path.lower().endswith(".star"), path.lower().endswith((".mrc", ".map"))
    table = path if is_table else None if is_map else urls.join(path, "particles.star")
    density = path if is_map else None if is_table else urls.join(path, "map.mrc")
    if table and density:
        table, density = (name if urls.exists(name) else None for name in (table, density))
        if not table and not density:
            raise MissingInputError(
                f"{urls.redacted(path)}: neither particles.star nor map.mrc is there: finish it with scalecryo assign"
            )
    if is_reference(truth):
        return _against_reference(path, density, truth)
    true_density, pixel_size, _ = read_map(urls.join(truth, "truth.mrc"))
    true_map, extent = torch.from_numpy(true_density), true_density.shape[-1] * pixel_size
    # What cannot be used is refused before anything that takes long.
    rows = _matched(table, urls.join(truth, "truth.star"), pixel_size) if table else None
    volume = _volume_of_extent(density, extent) if density else None
    if rows and rows.classes and rows.class_index is not None and rows.class_true is not None:
        # The top level is class 1: it is compared with what most of its particles show.
        shown = int(rows.classes.confusion[:, 0].argmax())
        true_map, _ = _true_map(truth, shown)
        rows = replace(rows, of_first=(rows.class_index == 1) & (rows.class_true == shown + 1))
    group = _group(path if not is_table and not is_map else None, symmetry)
    related = torch.eye(3)[None]
    if rows:
        related = _related(true_map, pixel_size, group, truth)
    poses = _compare(rows, rows.of_first, related, exact=group is not None) if rows else None
    maps: MapComparison | None = None
    if density and volume is not None:
        maps = compare_maps(
            volume, true_map, extent, poses.alignment if poses else None, related[:1] if group else related
        )
        _draw(maps, urls.parent(density))
    images = len(rows.rotation) if rows else None
    line = summary(images, poses, maps) | {
        "junk_auc": rows.junk_auc if rows else None,
        "symmetry": group.name if group else None,
        **(_classes(rows, truth, urls.parent(density) if density else None, group) if rows else {}),
        "box_size": true_map.shape[-1],
        "pixel_size": pixel_size,
    }
    return _told(line, truth)


def _against_reference(path: str, density: str | None, reference: str) -> dict[str, Any]:
    """A run's map, or a map, against one map or structure."""
    if density is None:
        raise InputError(
            f"{urls.redacted(path)}: it holds poses, no map, and {urls.redacted(reference)} is a map or structure: "
            "give a run or a map, or a folder with truth.star"
        )
    found = compare_with_reference(density, reference)
    _draw(found.maps, urls.parent(density))
    return _told(found.line(), reference)


def _told(line: dict[str, Any], truth: str) -> dict[str, Any]:
    """Print the JSON line, and what it comes to as a sentence; returns it, rounded."""
    line = {key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}
    say(json.dumps(line))
    note(sentence(line, urls.redacted(truth)))
    return line


def _group(run: str | None, name: str | None) -> PointGroup | None:
    """The point group that was asked for, else the run's; None: C1."""
    if name is None and run is not None and urls.exists(urls.join(run, "config.toml")):
        name = RunFolder(run).config().train.symmetry
    group = PointGroup.of(name or "C1")
    return group if len(group) > 1 else None


def _related(volume: torch.Tensor, pixel_size: float, group: PointGroup | None, truth: str) -> torch.Tensor:
    """A group's rotations about their axes in the true map, the identity first; without a group those that it has."""
    if group is None:
        return rotational_symmetry(volume)
    mask = mask_from_map(volume, pixel_size)
    axes = symmetry_axes(volume * mask, group, _AXES_RADIUS, centre_of_mass(volume, mask))
    if axes.agreement < _AGREES:
        note(f"{urls.redacted(truth)}: the true map agrees with itself under {group.name} at {axes.agreement:.2f} only")
    return axes.rotations(group)


@dataclass(frozen=True)
class _Matched:
    """Particles that are in both tables: estimated and true rotations, and shifts in px where a table has them."""

    rotation: torch.Tensor
    rotation_true: torch.Tensor
    shift_px: torch.Tensor | None
    shift_true_px: torch.Tensor | None
    junk_auc: float | None
    class_index: NDArray[np.int64] | None = None
    class_true: NDArray[np.int64] | None = None
    of_first: Bool[NDArray, " n"] | None = None

    @cached_property
    def classes(self) -> ClassComparison | None:
        """Of the labels, from 1; None where a table has none, or the truth knows one structure."""
        if self.class_index is None or self.class_true is None:
            return None
        return compare_classes(self.class_index, self.class_true)


def _compare(
    rows: _Matched, keep: Bool[NDArray, " n"] | None, related: torch.Tensor, *, exact: bool = False
) -> PoseComparison | None:
    """Errors of the poses of all rows, or of some; None of too few. See `compare_poses`."""
    at = torch.ones(len(rows.rotation), dtype=torch.bool) if keep is None else torch.from_numpy(keep)
    if keep is not None and int(at.sum()) < LEAST_OF_CLASS:
        return None
    shifts = [None if shift is None else shift[at] for shift in (rows.shift_px, rows.shift_true_px)]
    return compare_poses(rows.rotation[at], rows.rotation_true[at], shifts[0], shifts[1], related, exact=exact)


def _true_map(truth: str, number: int) -> tuple[torch.Tensor, float]:
    """truth.mrc, truth_2.mrc, …: the structure of a class, from 0, and its pixel size."""
    density, pixel_size, _ = read_map(urls.join(truth, f"truth_{number + 1}.mrc" if number else "truth.mrc"))
    return torch.from_numpy(density), pixel_size


def _classes(rows: _Matched, truth: str, folder: str | None, group: PointGroup | None) -> dict[str, Any]:
    """Labels, and by true class the errors of its particles and of the map of the class that most of them are in."""
    found = rows.classes
    if found is None or rows.class_index is None:
        return {"class_accuracy": None}
    pose: list[float | None] = []
    reached: list[float | None] = []
    for number, partner in enumerate(found.partner.tolist()):
        keep = (rows.class_index == partner + 1) & (rows.class_true == number + 1)
        true_map, pixel_size = _true_map(truth, number)
        related = _related(true_map, pixel_size, group, truth)
        poses = _compare(rows, keep, related, exact=group is not None)
        errors = None if poses is None else poses.modulo or poses.errors
        pose.append(None if errors is None else round(errors.median_deg, 5))
        path = urls.join(folder, f"class{partner + 1}", "map.mrc") if folder and partner >= 0 else None
        if path is None or poses is None or not urls.exists(path):
            reached.append(None)
            continue
        volume, size, _ = read_map(path)
        extent = volume.shape[-1] * size
        turned = related[:1] if group else related
        maps = compare_maps(torch.from_numpy(volume), true_map, extent, poses.alignment, turned)
        reached.append(round(maps.errors.angstrom_05, 5))
    return {
        "class_accuracy": found.accuracy, "class_purity": found.purity, "class_confusion": found.confusion.tolist(),
        "class_partner": [partner + 1 for partner in found.partner.tolist()],
        "class_rotation_error_median_deg": pose, "class_fsc_0.5_angstrom": reached,
    }  # fmt: skip


def _matched(table: str, truth: str, pixel_size: float) -> _Matched:
    """The images in both tables but for junk, row for row."""
    estimate, true = read_poses(table), read_poses(truth)
    row_of = {image_key(name): row for row, name in enumerate(true.names)}
    pairs = [(row, row_of[image_key(name)]) for row, name in enumerate(estimate.names) if image_key(name) in row_of]
    particle = _is_particle(truth, len(true.names))
    scored = [(row, true_row) for row, true_row in pairs if particle[true_row]]
    if len(scored) < 2:
        raise InputError(
            f"{urls.redacted(table)}: {len(scored)} of its image names are in {urls.redacted(truth)}: "
            "these are other particles; give the truth that the images were simulated with"
        )
    mine, theirs = (list(rows) for rows in zip(*scored, strict=True))

    def shift_px(source: StarPoses, rows: list[int]) -> torch.Tensor | None:
        return None if source.shift is None else torch.from_numpy(source.shift[rows]) / pixel_size

    auc = None
    if estimate.confidence is not None and len(scored) < len(pairs):
        rows, true_rows = np.array(pairs).T
        auc = junk_auc(estimate.confidence[rows], particle[true_rows])
    rotation, rotation_true = torch.from_numpy(estimate.rotation[mine]), torch.from_numpy(true.rotation[theirs])
    labels = [_labels(name, picked) for name, picked in ((table, mine), (truth, theirs))]
    shifts = shift_px(estimate, mine), shift_px(true, theirs)
    return _Matched(rotation, rotation_true, *shifts, auc, *(labels if labels[1] is not None else ()))


def _labels(table: str, rows: list[int]) -> NDArray[np.int64] | None:
    """Class of some rows, from 1; None where there is but one, or a run of one class kept those of its source."""
    columns = OwnColumns(urls.read_bytes(table), urls.redacted(table))
    own = CLASS_PROBABILITY in columns.names or JUNK in columns.names or not table.endswith("/particles.star")
    if CLASS not in columns.names or not own:
        return None
    found = columns.numbers(CLASS)[rows].astype(np.int64)
    return found if int(found.max()) > 1 and int(found.min()) > 0 else None


def _is_particle(truth: str, count: int) -> Bool[NDArray, " n"]:
    """Which rows of truth.star show a particle: all that it does not call junk."""
    columns = OwnColumns(urls.read_bytes(truth), urls.redacted(truth))
    return columns.numbers(JUNK) == 0 if JUNK in columns.names else np.ones(count, dtype=bool)


def _volume_of_extent(path: str, wanted: float) -> torch.Tensor:
    """A cubic map whose box is `wanted` Å wide."""
    volume, pixel_size, _ = read_map(path)
    if len(set(volume.shape)) != 1 or abs(volume.shape[-1] * pixel_size / wanted - 1) > 0.01:
        shape = " × ".join(map(str, volume.shape))
        raise InputError(
            f"{urls.redacted(path)}: {shape} voxels of {pixel_size:g} Å, but the true map's box is {wanted:.1f} Å "
            "wide: resample the map to that box"
        )
    return torch.from_numpy(volume)


def _draw(maps: MapComparison, folder: str) -> None:
    """Write evaluate_fsc.png, evaluate_fsc.csv and evaluate_slices.png."""
    errors = maps.errors
    label = f"map against truth (0.5 at {errors.angstrom_05:.2f} Å, 0.143 at {errors.angstrom_0143:.2f} Å)"
    curve = fsc_figure({label: errors.curve.numpy()}, maps.truth.shape[-1], maps.pixel_size)
    slices = slices_figure({"truth": maps.truth.numpy(), "estimate, aligned": maps.aligned.numpy()}, maps.pixel_size)
    values = "".join(f"{shell},{value:.5f}\n" for shell, value in enumerate(errors.curve.tolist()))
    urls.write_bytes_atomic(urls.join(folder, "evaluate_fsc.png"), curve)
    urls.write_bytes_atomic(urls.join(folder, "evaluate_fsc.csv"), ("shell,fsc\n" + values).encode())
    urls.write_bytes_atomic(urls.join(folder, "evaluate_slices.png"), slices)
