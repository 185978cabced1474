"""An estimate against the truth in one call each for poses and maps: align, then measure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.evaluate.align import Alignment, align_poses, origin_offset
from scalecryo.evaluate.align_maps import align_maps, apply_alignment, offset
from scalecryo.evaluate.metrics import (
    MapErrors,
    RotationErrors,
    map_errors,
    nearest_related,
    rotation_errors,
    shift_errors,
)
from scalecryo.physics.fft import fourier_resize_3d

# Share of the particles, weighted by closeness, above which the poses' own alignment is one to start the map's from.
_TRUSTED = 0.1
_ALIKE = 0.12  # of the box: a resolution coarser than shell 8 is what any two blobs of one size reach


@dataclass(frozen=True)
class PoseComparison:
    """Alignment of the poses on the even rows, and errors on the odd ones.

    Attributes:
        alignment: of the even rows.
        errors: of rotations.
        modulo: the same with each particle at its nearest symmetry-related pose; None without symmetry.
        shift_median_px: with each particle at its nearest symmetry-related pose; None where one side has no shifts.
    """

    alignment: Alignment
    errors: RotationErrors
    modulo: RotationErrors | None
    shift_median_px: float | None


def compare_poses(
    rotation: Float[Tensor, "n 3 3"],
    rotation_true: Float[Tensor, "n 3 3"],
    shift_px: Float[Tensor, "n 2"] | None,
    shift_true_px: Float[Tensor, "n 2"] | None,
    symmetry: Float[Tensor, "g 3 3"],
    *,
    exact: bool = False,
) -> PoseComparison:
    """Errors of estimated poses, fitted on one half of the rows and scored on the other.

    Args:
        rotation: estimated, row for row with the true ones.
        rotation_true: true.
        shift_px: estimated, px, or None.
        shift_true_px: true, px, or None.
        symmetry: rotations of the true map (`rotational_symmetry`), the identity first.
        exact: whether these are a point group, any of whose related poses may have been found for each particle: all
            errors are modulo it.

    Raises:
        InputError: fewer than two particles.
    """
    if len(rotation) < 2:
        raise InputError(f"{len(rotation)} particles cannot be both aligned and scored: give at least two")
    fit, score = slice(0, None, 2), slice(1, None, 2)
    alignment = align_poses(rotation[fit], rotation_true[fit], symmetry if exact else None)
    aligned, judged = alignment.rotations(rotation[score]), rotation_true[score]
    shift_median = None
    if shift_px is not None and shift_true_px is not None:
        related = nearest_related(alignment.rotations(rotation), rotation_true, symmetry)
        origin = origin_offset(shift_px[fit], shift_true_px[fit], related[fit])
        shift_median = float(shift_errors(shift_px[score], shift_true_px[score], related[score], origin).median())
    return PoseComparison(
        alignment,
        rotation_errors(aligned, judged, symmetry if exact else None),
        rotation_errors(aligned, judged, symmetry) if len(symmetry) > 1 else None,
        shift_median,
    )


@dataclass(frozen=True)
class MapComparison:
    """An estimated map on the true one, both in the smaller of the two boxes.

    Attributes:
        alignment: of the estimate.
        aligned: the estimate, turned, moved and mirrored onto the truth.
        truth: the true map.
        pixel_size: Å, of both.
        errors: their Fourier shell correlation, without a mask.
    """

    alignment: Alignment
    aligned: Float[Tensor, "n n n"]
    truth: Float[Tensor, "n n n"]
    pixel_size: float
    errors: MapErrors


def compare_maps(
    volume: Float[Tensor, "n n n"],
    truth: Float[Tensor, "m m m"],
    extent: float,
    poses: Alignment | None,
    symmetry: Float[Tensor, "g 3 3"],
) -> MapComparison:
    """Align a map with the truth, in either hand, and compare them.

    Args:
        volume: estimate.
        truth: the true map, over the same extent; boxes may differ.
        extent: of both boxes, Å.
        poses: alignment of the poses that belong to the map; without it, or when it fits hardly any particle, all
            rotations are searched.
        symmetry: rotations of the true map, each of which is tried from there.
    """
    box_size = min(volume.shape[-1], truth.shape[-1])
    volume, truth = fourier_resize_3d(volume, box_size), fourier_resize_3d(truth, box_size)
    initial: list[Alignment] = []
    if poses is not None and poses.score > _TRUSTED:
        turned = [
            Alignment(operator @ poses.rotation.to(operator), poses.mirrored, torch.zeros(3), poses.score)
            for operator in symmetry
        ]
        # A class's structure may stand far from where its map was centred: too far to be found by small steps.
        initial = [replace(start, shift_px=offset(apply_alignment(volume, start), truth)) for start in turned]
    alignment = align_maps(volume, truth, initial, search=not initial)
    aligned = apply_alignment(volume, alignment)
    pixel_size = extent / box_size
    return MapComparison(alignment, aligned, truth, pixel_size, map_errors(aligned, truth, pixel_size))


def sentence(line: Mapping[str, Any], truth: str) -> str:
    """What the numbers of `scalecryo evaluate` come to, in words; `truth`: what was compared with."""
    parts, alike = [], True
    if line.get("fsc_0.5_angstrom") is not None:
        masked = line.get("fsc_masked_0.5_angstrom")
        within = f" ({masked:.2f} Å within a mask around it)" if masked is not None else ""
        resolved = masked or line["fsc_0.5_angstrom"]
        extent = line["box_size"] * line["pixel_size"]
        alike = resolved < _ALIKE * extent
        parts.append(
            f"the map {'agrees with' if alike else 'is nothing like'} {truth}: "
            f"FSC 0.5 at {line['fsc_0.5_angstrom']:.2f} Å{within}"
        )
        if resolved < 1.05 * 2 * line["pixel_size"]:
            parts.append(f"that is all that pixels of {line['pixel_size']:.3g} Å can hold")
    if line.get("rotation_error_median_deg") is not None:
        shift = line.get("shift_error_median_px")
        moved = f" and {shift:.2f} px" if shift is not None else ""
        parts.append(f"the median error of poses is {line['rotation_error_median_deg']:.2f}°{moved}")
    if line.get("hand") is not None and alike:
        parts.append("in the same hand" if line["hand"] == "same" else "after mirroring: the hand is the other one")
    return "; ".join(parts) or f"nothing could be compared with {truth}"


def summary(
    images: int | None, poses: PoseComparison | None, maps: MapComparison | None
) -> dict[str, float | int | str | None]:
    """The numbers of a comparison by the names that `scalecryo evaluate` prints; None where one does not apply."""
    errors = poses.errors if poses else None
    modulo = poses.modulo if poses else None
    fsc = maps.errors if maps else None
    alignment = maps.alignment if maps else poses.alignment if poses else None
    return {
        "images": images,
        "rotation_error_median_deg": errors.median_deg if errors else None,
        "rotation_error_mean_deg": errors.mean_deg if errors else None,
        "rotation_error_frobenius2_median": errors.frobenius2_median if errors else None,
        "rotation_error_frobenius2_mean": errors.frobenius2_mean if errors else None,
        "rotation_error_mod_pseudosymmetry_median_deg": modulo.median_deg if modulo else None,
        "rotation_error_mod_pseudosymmetry_mean_deg": modulo.mean_deg if modulo else None,
        "out_of_plane_error_median_deg": errors.out_of_plane_median_deg if errors else None,
        "shift_error_median_px": poses.shift_median_px if poses else None,
        "fsc_0.5_shell": fsc.shell_05 if fsc else None,
        "fsc_0.5_angstrom": fsc.angstrom_05 if fsc else None,
        "fsc_0.143_shell": fsc.shell_0143 if fsc else None,
        "fsc_0.143_angstrom": fsc.angstrom_0143 if fsc else None,
        "fsc_mean": fsc.mean if fsc else None,
        "hand": ("mirrored" if alignment.mirrored else "same") if alignment else None,
    }
