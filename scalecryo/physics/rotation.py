"""Rotations, and the one convention that all code here follows.

R maps the image frame to the volume frame: the slice of an image is F_img(kx, ky) = F_vol(R (kx, ky, 0)), so a point r
of the volume appears in the image at the first two components of R^T r. In RELION's angles (rot, tilt, psi), degrees,

    R = Rz(rot) Ry(tilt) Rz(psi),

which is scipy's Rotation.from_euler("ZYZ", [rot, tilt, psi]) and the transpose of RELION's Euler matrix A.
cryoSPARC stores R as a rotation vector; cryoDRGN stores R^T. Vectors are (x, y, z).
"""

import roma
import torch
from jaxtyping import Float
from torch import Tensor


def euler_to_rotation(angles_deg: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3 3"]:
    """R of RELION's (rot, tilt, psi) in degrees."""
    return euler_head_to_rotation(torch.deg2rad(angles_deg))


def euler_head_to_rotation(angles: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3 3"]:
    """R of (rot, tilt, psi) in radians; any real numbers, differentiable (the paper's `euler` head)."""
    return roma.euler_to_rotmat("ZYZ", angles)


def rotation_to_euler(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3"]:
    """RELION's (rot, tilt, psi) in degrees: tilt in [0, 180], rot and psi in [-180, 180].

    At tilt 0 or 180 only one combination of rot and psi is defined and one of them is set to zero; the matrix
    built from the result is the same. Computed in double precision, returned in the input's.
    """
    angles = roma.rotmat_to_euler("ZYZ", rotation.double(), degrees=True)
    return angles.to(rotation.dtype)


def s2s2_to_rotation(vectors: Float[Tensor, "... 6"]) -> Float[Tensor, "... 3 3"]:
    """R whose first two columns are the Gram-Schmidt basis of two 3-vectors (the paper's `s2s2`; Zhou et al. 2019).

    Finite for every input; a rotation wherever the two vectors are not parallel.
    """
    return roma.special_gramschmidt(vectors.unflatten(-1, (2, 3)).mT, epsilon=1e-12)


def quaternion_to_rotation(numbers: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3 3"]:
    """R of the unit quaternion that three real numbers (a, b, c), radians, name (the paper's `quaternion` head).

    q = (cos a sin b, cos a cos b, sin a sin c, sin a cos c) in x, y, z, w order: Shoemake's subgroup map (Uniform
    random rotations, Graphics Gems III, 1992) with its uniform variate written as sin^2 a, so that no square root
    spoils the gradient.
    """
    a, b, c = numbers.unbind(-1)
    quaternion = torch.stack([a.cos() * b.sin(), a.cos() * b.cos(), a.sin() * c.sin(), a.sin() * c.cos()], dim=-1)
    return roma.unitquat_to_rotmat(quaternion)


def random_rotations(
    count: int,
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "count 3 3"]:
    """Rotations uniform on SO(3). They are drawn on the generator's device, so a seed means the same everywhere."""
    source = device if generator is None else generator.device
    return roma.random_rotmat((count,), dtype=dtype, device=source, generator=generator).to(device)


def rotation_from_vector(vector: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3 3"]:
    """exp of so(3): the rotation about `vector` by its length in radians. Finite gradients at zero."""
    return roma.rotvec_to_rotmat(vector)


def vector_from_rotation(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3"]:
    """log of SO(3): the axis times the angle in radians, in [0, pi]."""
    return roma.rotmat_to_rotvec(rotation)


def geodesic_angle(a: Float[Tensor, "... 3 3"], b: Float[Tensor, "... 3 3"]) -> Float[Tensor, "..."]:
    """Angle in degrees of the rotation that takes a to b, in [0, 180]; accurate for small angles (chord length)."""
    return torch.rad2deg(roma.rotmat_geodesic_distance(a, b))


def nearest_turned(
    turns: Float[Tensor, "g 3 3"], rotation: Float[Tensor, "b 3 3"], to: Float[Tensor, "b 3 3"]
) -> Float[Tensor, "b 3 3"]:
    """Of S R, for every turn S, the one nearest to another rotation: of the largest trace."""
    trace = torch.einsum("gij,bij->bg", turns, to @ rotation.mT)
    return turns[trace.argmax(1)] @ rotation


def flip_hand(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3 3"]:
    """F R F with F = diag(1, 1, -1).

    The map mirrored in z, seen at flip_hand(R), gives the same image as the map itself seen at R.
    """
    mirrored = torch.arange(3, device=rotation.device) == 2
    return torch.where(mirrored[:, None] ^ mirrored[None, :], -rotation, rotation)
