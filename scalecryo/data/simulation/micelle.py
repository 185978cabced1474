"""A belt of detergent around a membrane protein."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.mask import mask_from_map

# Å. Half the thickness of the belt at the axis, its width beyond the protein, its soft edge, and the resolution at
# which the protein's surface is found, at a level of the peaks that gives 4AKE its volume (1.21 Å³/Da) to 2 %.
_HALF_THICKNESS_A = 20.0
_WIDTH_A = 25.0
_EDGE_A = 5.0
_SURFACE_A = 10.0
_SURFACE_LEVEL = 0.4
# Share of the protein's voxels in the slab of the belt that lie within the radius that the belt begins at.
_WITHIN = 0.95


def with_micelle(volume: Float[Tensor, "n n n"], pixel_size: float, density: float) -> Float[Tensor, "n n n"]:
    """A map with a belt of detergent about the z axis.

    The belt is an ellipsoid about the map's centre, of semi-axes 20 Å along z and r + 25 Å across, without the protein;
    r holds 95 % of the protein's voxels at |z| < 20 Å. Its edges are 5 Å wide. The protein is what stands out from the
    background of the map at 10 Å.

    Args:
        volume: density of the protein, the centre at index n//2.
        pixel_size: Å.
        density: of the belt, relative to the mean density within the protein.

    Raises:
        InputError: a negative density, or the belt does not fit in the box.
    """
    if not 0 <= density < math.inf:
        raise InputError(f"a micelle of density {density:g} cannot be made: give a share of the protein's, e.g. 0.6")
    if density == 0:
        return volume
    n = volume.shape[-1]
    low_pass = max(_SURFACE_A, 5 * pixel_size)
    protein = mask_from_map(
        volume, pixel_size, low_pass=low_pass, threshold=_SURFACE_LEVEL, dilate_px=0.0, edge_px=_EDGE_A / pixel_size
    )
    inside = protein == 1
    axis = pixel_size * (torch.arange(n) - n // 2)
    z, radius = axis[:, None, None], (axis[:, None].square() + axis.square()).sqrt()[None]
    slab = inside & (z.abs() < _HALF_THICKNESS_A)
    if not bool(slab.any()):
        raise InputError("no protein at the height of the belt (|z| < 20 Å from the centre): move the structure there")
    across = float(np.quantile(radius.expand_as(slab)[slab].numpy(), _WITHIN)) + _WIDTH_A
    needed = 2 * (across + _EDGE_A)
    if needed > n * pixel_size:
        raise InputError(
            f"the micelle needs {needed:.0f} Å and a box of {n} px at {pixel_size:g} Å/px has {n * pixel_size:.0f} Å: "
            f"use a box of at least {2 * math.ceil(needed / pixel_size / 2)} px, or larger pixels"
        )
    # The distance from the surface of an ellipsoid f = 1, to first order: f (f - 1) / |grad f²/2|.
    f = ((radius / across).square() + (z / _HALF_THICKNESS_A).square()).sqrt()
    gradient = ((radius / across**2).square() + (z / _HALF_THICKNESS_A**2).square()).sqrt()
    distance = f * (f - 1) / gradient.clamp_min(1e-6)
    edge = 0.5 + 0.5 * torch.cos(math.pi * (distance / _EDGE_A + 0.5).clamp(0, 1))
    return volume + density * float(volume[inside].mean()) * edge * (1 - protein)
