"""Local minima of several small problems at once, which one by one would be all overhead."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_DECREASE = 1e-4  # of what the slope promises: Armijo's condition
_UNCHANGED = 1e-5  # a step so short ends it


def local_minima(
    cost: Callable[[Float[Tensor, "b d"]], Float[Tensor, " b"]], start: Float[Tensor, "b d"], evaluations: int
) -> Float[Tensor, "b d"]:
    """Where BFGS ends from each start (Nocedal and Wright 2006, algorithm 6.1; step lengths by their §3.5).

    Each problem has a step and an inverse Hessian of its own. A step that lowers the cost too little is made shorter by
    the parabola through what is known of it, so that every evaluation serves all problems, wherever they are.

    Args:
        cost: the costs of all problems; that of one depends on its own row alone. It must be differentiable.
        start: where each begins; a step of about one should matter along every axis.
        evaluations: how often the costs are asked for, the first time included.
    """
    count, size = start.shape
    identity = torch.eye(size).to(start).expand(count, size, size)
    place, inverse, fresh = start.clone(), identity, torch.ones(count, dtype=torch.bool, device=start.device)
    value, slope = _differentiated(cost, place)
    direction = -slope
    length = slope.abs().sum(1).clamp_min(1.0).reciprocal()
    for _ in range(evaluations - 1):
        step = length[:, None] * direction
        if float(step.abs().max()) < _UNCHANGED:
            break
        new_value, new_slope = _differentiated(cost, place + step)
        change, promised = new_slope - slope, (slope * step).sum(1)
        taken = new_value <= value + _DECREASE * promised
        updated = _with_step(torch.where(fresh[:, None, None], _scaled(step, change), inverse), step, change)
        inverse = torch.where(taken[:, None, None], updated, inverse)
        shortened = -promised / (2 * (new_value - value - promised)).clamp_min(1e-30)
        length = torch.where(taken, 1.0, length * shortened.clamp(0.1, 0.5))
        place = torch.where(taken[:, None], place + step, place)
        value, slope = torch.where(taken, new_value, value), torch.where(taken[:, None], new_slope, slope)
        direction = torch.where(taken[:, None], -(inverse @ slope[:, :, None])[:, :, 0], direction)
        fresh = fresh & ~taken
    return place


def _differentiated(
    cost: Callable[[Float[Tensor, "b d"]], Float[Tensor, " b"]], place: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b d"]]:
    """Costs and their slopes."""
    with torch.enable_grad():  # whoever asks may not
        asked = place.detach().requires_grad_()
        value = cost(asked)
        (slope,) = torch.autograd.grad(value.sum(), asked)
    return value.detach(), slope


def _scaled(step: Float[Tensor, "b d"], change: Float[Tensor, "b d"]) -> Float[Tensor, "b d d"]:
    """A first inverse Hessian: the identity by the curvature along the first step."""
    curved = (step * change).sum(1) / change.square().sum(1).clamp_min(1e-30)
    scale = torch.where(curved > 0, curved, torch.ones_like(curved))
    return scale[:, None, None] * torch.eye(step.shape[1]).to(step)


def _with_step(
    inverse: Float[Tensor, "b d d"], step: Float[Tensor, "b d"], change: Float[Tensor, "b d"]
) -> Float[Tensor, "b d d"]:
    """The inverse Hessians after a step along which the slope changed so; as they were where it curves downwards."""
    curved = (step * change).sum(1)
    usable = curved > 1e-10
    rho = torch.where(usable, curved, torch.ones_like(curved)).reciprocal()[:, None, None]
    left = torch.eye(step.shape[1]).to(step) - rho * step[:, :, None] * change[:, None, :]
    updated = left @ inverse @ left.mT + rho * step[:, :, None] * step[:, None, :]
    return torch.where(usable[:, None, None], updated, inverse)
