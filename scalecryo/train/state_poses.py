"""Poses refined with the linear model of variety: each image against the map of its own state.

A reference that is the mean over all states shows what moves as a blur: poses found with it are as good as what stands
still allows, and follow a little what moves. Here pose and coordinates are found together: Gauss-Newton's columns are
the derivatives of the prediction A (a μ + W z) by turn and shift, beside A W and A μ, whose coefficients have a prior.
The cost is the negative logarithm of the evidence, in which coordinates and contrast are integrated out.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.map.components import products
from scalecryo.physics.rotation import rotation_from_vector
from scalecryo.train.component_model import ComponentModel, Components
from scalecryo.train.posed_images import PosedImages

STEPS = 2
PROBE_PX = 0.25  # by which the outermost pixel moves for a derivative
DAMPING = 1e-2  # added to the scaled diagonal of the pose
MOST_TURN, MOST_SHIFT_PX = 0.1, 1.0  # of a step: rad, px of the level


@dataclass(frozen=True, eq=False)
class _Fit:
    """The model at some poses.

    Attributes:
        cost: negative log-evidence, up to a constant of the image.
        latents: mean of the coordinates.
        contrast: of each image.
        predicted: A μ.
        slices: A W.
        unexplained: y − A (a μ + W z).
    """

    cost: Float[Tensor, " b"]
    latents: Float[Tensor, "b q"]
    contrast: Float[Tensor, " b"]
    predicted: Complex[Tensor, "b p"]
    slices: Complex[Tensor, "b q p"]
    unexplained: Complex[Tensor, "b p"]

    @classmethod
    def of(cls, model: ComponentModel, posed: PosedImages, which: Components) -> "_Fit":
        residual, predicted = model.residual(posed)
        found = model.expect_with(residual, predicted, model.slices(posed, which))
        power = residual.real.square() + residual.imag.square()
        cost = 0.5 * (power.double() @ model.pixel_weight.double()) - found.latents.evidence
        own = combined(predicted, found.slices, found.contrast, found.latents.mean)
        return cls(cost, found.latents.mean, found.contrast, predicted, found.slices, posed.centred - own)

    def better(self, other: "_Fit", at: Tensor) -> "_Fit":
        """The other's where `at` is true."""
        made = {}
        for name, own in vars(self).items():
            made[name] = torch.where(at.reshape(-1, *[1] * (own.ndim - 1)), getattr(other, name), own)
        return _Fit(**made)


def combined(
    predicted: Complex[Tensor, "b p"],
    slices: Complex[Tensor, "b q p"],
    contrast: Float[Tensor, " b"],
    latents: Float[Tensor, "b q"],
) -> Complex[Tensor, "b p"]:
    """A (a μ + W z)."""
    return contrast[:, None] * predicted + (latents.to(slices)[:, None] @ slices)[:, 0]


@torch.no_grad()
def refine_with_states(
    model: ComponentModel, posed: PosedImages, *, fit_shift: bool, which: Components = "own", steps: int = STEPS
) -> tuple[PosedImages, Float[Tensor, " b"]]:
    """The images at poses refined together with their coordinates, and the negative logarithm of
    the evidence of each at its pose, up to a constant of the image.

    Args:
        model: prepared for the images' pixels.
        posed: images at the poses to begin with.
        fit_shift: False leaves shifts as they are.
        which: of the halves' components.
        steps: of Gauss-Newton; one that does not lower the cost of an image is not taken.
    """
    now = _Fit.of(model, posed, which)
    damping = torch.full_like(now.cost, DAMPING)
    for _ in range(steps):
        step = _step(model, posed, now, which, damping, fit_shift=fit_shift)
        turned = posed.rotation @ rotation_from_vector(step[:, :3].to(posed.rotation))
        trial = posed.at(turned, posed.poses.shift + step[:, 3:].to(turned) * posed.images.pixel_size)
        found = _Fit.of(model, trial, which)
        lower = found.cost < now.cost
        damping = torch.where(lower, damping, 10 * damping)
        posed, now = posed.where(trial, lower), now.better(found, lower)
    return posed, now.cost


def _step(
    model: ComponentModel, posed: PosedImages, now: _Fit, which: Components, damping: Tensor, *, fit_shift: bool
) -> Float[Tensor, "b 5"]:
    """Turn in the image frame (rad) and shift (px) of one damped step."""
    pixels = posed.images.pixels
    own = combined(now.predicted, now.slices, now.contrast, now.latents)
    angle, columns = PROBE_PX / pixels.radius_limit, []
    for axis in torch.eye(3, device=own.device):
        probe = replace(posed, poses=replace(posed.poses, rotation=posed.rotation @ rotation_from_vector(angle * axis)))
        _, predicted = model.residual(probe)
        columns.append((combined(predicted, model.slices(probe, which), now.contrast, now.latents) - own) / angle)
    if fit_shift:
        turn = complex(0, -2 * torch.pi / pixels.box_size)
        columns += [own * (turn * pixels.kx), own * (turn * pixels.ky)]
    free, scale = len(columns), max(model.spread, 1e-6)
    whole = torch.cat([torch.stack(columns, 1), scale * now.predicted[:, None], now.slices], 1)
    gram, gradient = (part.double() for part in products(whole, now.unexplained, model.pixel_weight))
    # The contrast's and the coordinates' own gradients vanish: they are at their best for this pose.
    gradient[:, free:] = 0
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal[:, :free] *= 1 + damping[:, None]
    diagonal[:, :free] += 1e-6 * diagonal[:, :free].amax(1, keepdim=True) + 1e-12
    diagonal[:, free:] += 1
    factor, _ = torch.linalg.cholesky_ex(gram)
    step = torch.cholesky_solve(gradient[:, :, None], factor)[:, :free, 0].nan_to_num()
    step = torch.nn.functional.pad(step, (0, 5 - free))
    return torch.cat([_cut(step[:, :3], MOST_TURN), _cut(step[:, 3:], MOST_SHIFT_PX)], 1)


def _cut(vector: Float[Tensor, "b n"], limit: float) -> Float[Tensor, "b n"]:
    """Shortened to at most a limit."""
    factor: Tensor = (limit / vector.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return vector * factor
