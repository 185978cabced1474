"""Errors of poses and maps against a known truth, after alignment (see `align`)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.physics.fsc import fsc, resolution
from scalecryo.physics.rotation import geodesic_angle


@dataclass(frozen=True)
class RotationErrors:
    """Summary of the angles between aligned estimated and true rotations.

    Attributes:
        median_deg, mean_deg: of the geodesic angle θ, degrees.
        frobenius2_median, frobenius2_mean: of the squared Frobenius norm of the difference of the matrices,
            8 sin²(θ/2), the measure of cryoAI and cryoDRGN2.
        out_of_plane_median_deg: of the angle between the two viewing directions (third columns), degrees.
    """

    median_deg: float
    mean_deg: float
    frobenius2_median: float
    frobenius2_mean: float
    out_of_plane_median_deg: float


def rotation_errors(
    aligned: Float[Tensor, "n 3 3"],
    truth: Float[Tensor, "n 3 3"],
    symmetry: Float[Tensor, "g 3 3"] | None = None,
) -> RotationErrors:
    """Errors of `aligned` rotations (already turned into the true frame, see `Alignment.rotations`).

    With `symmetry`, rotations S of the true map with V(S x) ≈ V(x), a pose R and its symmetry-related poses S R give
    the same image, and each particle counts with the nearest of them.
    """
    if symmetry is not None:
        truth = nearest_related(aligned, truth, symmetry)
    angle = geodesic_angle(aligned, truth)
    frobenius2 = (aligned - truth).square().sum(dim=(-2, -1))
    cosine = (aligned[:, :, 2] * truth[:, :, 2]).sum(-1)
    sine = torch.linalg.cross(aligned[:, :, 2], truth[:, :, 2]).norm(dim=-1)
    return RotationErrors(
        median_deg=float(angle.median()),
        mean_deg=float(angle.mean()),
        frobenius2_median=float(frobenius2.median()),
        frobenius2_mean=float(frobenius2.mean()),
        out_of_plane_median_deg=float(torch.rad2deg(torch.atan2(sine, cosine)).median()),
    )


def nearest_related(
    aligned: Float[Tensor, "n 3 3"], truth: Float[Tensor, "n 3 3"], symmetry: Float[Tensor, "g 3 3"]
) -> Float[Tensor, "n 3 3"]:
    """Of the symmetry-related poses S R of each true rotation R, the nearest to the aligned estimate."""
    related = torch.einsum("gij,njk->ngik", symmetry.to(truth), truth)
    nearest = geodesic_angle(aligned[:, None].expand_as(related), related).argmin(dim=1)
    return related[torch.arange(len(truth)), nearest]


def shift_errors(
    shift: Float[Tensor, "n 2"],
    truth: Float[Tensor, "n 2"],
    rotation_true: Float[Tensor, "n 3 3"],
    origin: Float[Tensor, "3"],
) -> Float[Tensor, " n"]:
    """Length of the shift error of each particle once the estimate's origin is taken out, in the units of `shift`.

    An estimated map whose content must move by `origin` to match the truth (true frame, see `align.origin_offset`)
    explains the images with shifts larger by (R_trueᵀ origin)_xy. Where the map has a symmetry, R_true is the
    symmetry-related pose that the estimate is nearest to (`nearest_related`).
    """
    seen = torch.einsum("nij,i->nj", rotation_true, origin)[:, :2]
    return (shift - truth - seen).norm(dim=-1)


def junk_auc(confidence: Float[NDArray, " n"], particle: Bool[NDArray, " n"]) -> float:
    """Area under the receiver operating characteristic of a confidence that is to tell particles from junk.

    The probability that a particle has a higher confidence than junk, ties counted half (Mann and Whitney's U). Both
    kinds must be there.
    """
    _, place, times = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[place]
    count = int(particle.sum())
    return (float(rank[particle].sum()) - count * (count + 1) / 2) / (count * (len(particle) - count))


@dataclass(frozen=True)
class MapErrors:
    """Fourier shell correlation of an aligned map with the truth, without a mask.

    Attributes:
        curve: (N/2 + 1,) correlation on integer shells, DC first.
        shell_05, shell_0143: first shells, interpolated, at which the curve falls below 0.5 and 0.143.
        angstrom_05, angstrom_0143: the same as resolution in Å.
        mean: of the curve over shells 1 … N/2 − 1.
    """

    curve: Float[Tensor, " s"]
    shell_05: float
    shell_0143: float
    angstrom_05: float
    angstrom_0143: float
    mean: float


def map_errors(aligned: Float[Tensor, "n n n"], truth: Float[Tensor, "n n n"], pixel_size: float) -> MapErrors:
    """FSC against the true map; `pixel_size` in Å. The truth is free of noise, so 0.5 is the usual criterion here."""
    box_size = truth.shape[-1]
    curve = fsc(aligned, truth)
    shell_05, angstrom_05 = resolution(curve, box_size, pixel_size, 0.5)
    shell_0143, angstrom_0143 = resolution(curve, box_size, pixel_size, 0.143)
    mean = float(curve[1 : box_size // 2].mean())
    return MapErrors(curve, shell_05, shell_0143, angstrom_05, angstrom_0143, mean)
