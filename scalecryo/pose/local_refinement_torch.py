"""Local refinement of poses on any device: the algorithm of `refine_cpu` for whole batches, in single or double
precision.

Everything is batched and nothing waits for the device: images that are done, or whose step failed, keep their pose.
"""

from typing import NamedTuple

import roma
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.kernels.backend import cuda_kernels
from scalecryo.physics.kernels.refine_step import DAMPING_FALL, DAMPING_RISE, FIRST_DAMPING, LEAST_DAMPING
from scalecryo.physics.kernels.views import Views


class Problem(NamedTuple):
    """What poses are judged by. Real fields in the precision of the complex ones; p pixels inside the transform."""

    volume_rfft: Complex[Tensor, "d d h"]
    observed: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None
    weight: Float[Tensor, " p"]
    kx: Float[Tensor, " p"]
    ky: Float[Tensor, " p"]
    scale: float
    box_size: int
    fused: bool = False
    """By the CUDA kernel, in one pass; else by torch."""

    def images(self, index: slice | Tensor) -> "Problem":
        """Some of the images."""
        return self._replace(observed=self.observed[index], ctf=None if self.ctf is None else self.ctf[index])


class _Cell(NamedTuple):
    """Transform at the eight neighbours of b*p samples, and where the samples lie between them."""

    corners: Complex[Tensor, "8 b p"]
    """x varies fastest, then y, then z."""
    fraction: Float[Tensor, "3 b p"]
    sign: Float[Tensor, "b p"]
    """-1 where the Friedel partner -q was taken."""


def _locate(problem: Problem, rotation: Float[Tensor, "b 3 3"]) -> _Cell:
    box = problem.volume_rfft.shape[0]
    half, width = box // 2, box // 2 + 1
    kx, ky = problem.scale * problem.kx, problem.scale * problem.ky
    # Not a matrix product: TF32 would cost whole voxels.
    position = torch.stack([rotation[:, i, :1] * kx + rotation[:, i, 1:2] * ky for i in range(3)])
    sign = torch.ones_like(position[0]).copysign(position[0])
    position = position * sign
    low = position.floor().clamp(-half, half - 1)
    x, y, z = low.long()
    x = x.clamp_min(0)
    rows = torch.stack([((z + k) % box * box + (y + j) % box) * width + x for k in (0, 1) for j in (0, 1)])
    corners = problem.volume_rfft.reshape(-1)[torch.stack([rows, rows + 1], dim=1).flatten(0, 1)]
    return _Cell(corners, position - low, sign)


def _conjugate(values: Complex[Tensor, "b p"], sign: Float[Tensor, "b p"]) -> Complex[Tensor, "b p"]:
    return torch.complex(values.real, values.imag * sign)


def _slices(cell: _Cell) -> Complex[Tensor, "b p"]:
    x, y, z = cell.fraction
    lines = torch.lerp(cell.corners[0::2], cell.corners[1::2], x.to(cell.corners.dtype))
    near, far = lines[0] + (lines[1] - lines[0]) * y, lines[2] + (lines[3] - lines[2]) * y
    return _conjugate(near + (far - near) * z, cell.sign)


def _slopes(cell: _Cell) -> list[Complex[Tensor, "b p"]]:
    """Derivatives of the slices by q_x, q_y, q_z. For a Friedel partner the chain rule brings a minus sign."""
    x, y, z = cell.fraction
    step, left = cell.corners[1::2] - cell.corners[0::2], cell.corners[0::2]
    lines = left + step * x
    rise_near, rise_far = lines[1] - lines[0], lines[3] - lines[2]
    step_near, step_far = step[0] + (step[1] - step[0]) * y, step[2] + (step[3] - step[2]) * y
    along = (
        step_near + (step_far - step_near) * z,
        rise_near + (rise_far - rise_near) * z,
        lines[2] + rise_far * y - lines[0] - rise_near * y,
    )
    return [_conjugate(slope, cell.sign) * cell.sign for slope in along]


def _residual(
    problem: Problem, slices: Complex[Tensor, "b p"], shift_px: Float[Tensor, "b 2"]
) -> tuple[Complex[Tensor, "b p"], Complex[Tensor, "b p"]]:
    """Prediction before the shift, and what the observation, shifted back, has more."""
    prediction = slices if problem.ctf is None else slices * problem.ctf
    centred = problem.observed * shift_ramp(-shift_px, problem.kx, problem.ky, problem.box_size)
    return prediction, centred - prediction


def _dot(a: Complex[Tensor, "b p"], b: Complex[Tensor, "b p"]) -> Float[Tensor, "b p"]:
    """Re conj(a) b, in double precision, for the sums to come."""
    return (a.real * b.real + a.imag * b.imag).double()


def costs(problem: Problem, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    """Sum of w |residual|^2 / 2, double precision."""
    if problem.fused:
        return _fused_sums(problem, rotation, shift_px, derivatives=False)[:, 0] / 2
    _, residual = _residual(problem, _slices(_locate(problem, rotation)), shift_px)
    return _dot(residual, residual) @ problem.weight.double() / 2


def normal_equations(
    problem: Problem, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b 5 5"], Float[Tensor, "b 5"]]:
    """Cost, Gauss-Newton matrix and minus the gradient of the cost, in the order wx, wy, wz, tx, ty.

    w is the turn of `refine_cpu`, in the image frame (rad); t the shift (px). Double precision.
    """
    if problem.fused:
        sums = _fused_sums(problem, rotation, shift_px, derivatives=True)
    else:
        sums = _sums(problem, rotation, shift_px)
    ee, aa_xx, aa_xy, aa_yy, uu_xx, uu_xy, uu_yy, au_xx, au_xy, au_yy, *rest = sums.unbind(-1)
    at_x, at_y, tu_x, tu_y, tt, ae_x, ae_y, te, ue_x, ue_y = rest
    matrix = torch.stack(
        [
            *(aa_yy, -aa_xy, at_y, au_xy, au_yy),
            *(-aa_xy, aa_xx, -at_x, -au_xx, -au_xy),
            *(at_y, -at_x, tt, tu_x, tu_y),
            *(au_xy, -au_xx, tu_x, uu_xx, uu_xy),
            *(au_yy, -au_xy, tu_y, uu_xy, uu_yy),
        ],
        dim=-1,
    ).reshape(-1, 5, 5)
    return ee / 2, matrix, torch.stack([ae_y, -ae_x, te, ue_x, ue_y], dim=-1)


def _fused_sums(
    problem: Problem, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"], *, derivatives: bool
) -> Float[Tensor, "b s"]:
    views = Views(rotation, shift_px, problem.ctf, problem.kx, problem.ky, problem.scale, problem.box_size)
    kernels = cuda_kernels()
    sums: Tensor = kernels.refinement_sums(
        problem.volume_rfft, problem.observed, views, problem.weight, derivatives=derivatives
    )
    return sums


def _sums(problem: Problem, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"]) -> Float[Tensor, "b 20"]:
    """The sums over pixels of `refine_cpu`, in its order."""
    cell = _locate(problem, rotation)
    prediction, e = _residual(problem, _slices(cell), shift_px)
    gx, gy, gz = _slopes(cell)
    contrast = problem.scale if problem.ctf is None else problem.scale * problem.ctf
    kx, ky, w = problem.kx, problem.ky, problem.weight.double()
    tangent = [kx * rotation[:, i, 1:2] - ky * rotation[:, i, :1] for i in range(3)]
    a = contrast * (gx * rotation[:, 0, 2:] + gy * rotation[:, 1, 2:] + gz * rotation[:, 2, 2:])
    t = contrast * (gx * tangent[0] + gy * tangent[1] + gz * tangent[2])
    u = prediction * complex(0, -2 * torch.pi / problem.box_size)

    linear = torch.stack([w * kx, w * ky], dim=-1)
    square = torch.stack([w * kx * kx, w * kx * ky, w * ky * ky], dim=-1)
    one = w[:, None]
    factors = (
        *((e, e, one), (a, a, square), (u, u, square), (a, u, square), (a, t, linear), (t, u, linear), (t, t, one)),
        *((a, e, linear), (t, e, one), (u, e, linear)),
    )
    return torch.cat([_dot(left, right) @ weight for left, right, weight in factors], dim=-1)


def _damped_step(
    matrix: Float[Tensor, "b 5 5"], gradient: Float[Tensor, "b 5"], damping: Float[Tensor, " b"], free: int
) -> Float[Tensor, "b 5"]:
    """`refine_step.damped_step` of every image; 0 where it is not finite."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)[:, :free]
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    scaled = matrix[:, :free, :free] * scale[:, :, None] * scale[:, None, :]
    off_diagonal = 1 - torch.eye(free, dtype=matrix.dtype, device=matrix.device)
    scaled = scaled * off_diagonal + torch.diag_embed((1 + damping)[:, None].expand(-1, free))
    factor, _ = torch.linalg.cholesky_ex(scaled)
    step = torch.cholesky_solve((gradient[:, :free] * scale)[:, :, None], factor)[:, :, 0] * scale
    return torch.nn.functional.pad(torch.nan_to_num(step, 0.0, 0.0, 0.0), (0, 5 - free))


def _cut(vector: Float[Tensor, "b n"], limit: float) -> Float[Tensor, "b n"]:
    """Shorten to at most limit."""
    factor: Tensor = (limit / vector.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return vector * factor


def refine_batch(
    problem: Problem,
    rotation: Float[Tensor, "b 3 3"],
    shift_px: Float[Tensor, "b 2"],
    passes: int,
    free: int,
    most_turn: float,
    most_shift: float,
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """RefinedPoses rotation and shift, costs before and after; arguments as the limits of
    `refine_cpu.refine_images`."""
    before, matrix, gradient = normal_equations(problem, rotation, shift_px)
    cost, damping = before, torch.full_like(before, FIRST_DAMPING)
    for number in range(passes):
        step = _damped_step(matrix, gradient, damping, free)
        turned = rotation.double() @ roma.rotvec_to_rotmat(_cut(step[:, :3], most_turn))
        # Rounded before the cost is taken, so that it is that of the pose returned.
        trial = roma.special_gramschmidt(turned[:, :, :2]).to(rotation.dtype)
        moved = (shift_px.double() + _cut(step[:, 3:], most_shift)).to(shift_px.dtype) if free == 5 else shift_px
        last = number == passes - 1
        now, *system = (costs(problem, trial, moved),) if last else normal_equations(problem, trial, moved)
        better = now < cost
        cost = torch.where(better, now, cost)
        rotation = torch.where(better[:, None, None], trial, rotation)
        shift_px = torch.where(better[:, None], moved, shift_px)
        damping = torch.where(better, (damping * DAMPING_FALL).clamp_min(LEAST_DAMPING), damping * DAMPING_RISE)
        if system:
            matrix = torch.where(better[:, None, None], system[0], matrix)
            gradient = torch.where(better[:, None], system[1], gradient)
    return rotation, shift_px, before, cost
