"""Several small problems minimised at once."""

import pytest
import torch
from torch import Tensor

from scalecryo.evaluate.local_minima import local_minima


def test_quadratic_problems_of_any_scale_end_at_their_own_minima() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    curvature = root @ root.mT + torch.eye(6)
    curvature *= torch.logspace(-1, 3, 5)[:, None, None]
    minimum = torch.randn(5, 6, generator=generator, dtype=torch.float64)

    def cost(place: Tensor) -> Tensor:
        off = (place - minimum)[:, :, None]
        return (off.mT @ curvature @ off)[:, 0, 0] / 2

    found = local_minima(cost, torch.zeros(5, 6, dtype=torch.float64), 60)
    # Closed form. A step of 1e-5 ends it, and BFGS converges faster than linearly.
    assert found == pytest.approx(minimum, abs=1e-4)


def test_a_curved_valley_is_followed_from_either_side() -> None:
    """Rosenbrock's function has its minimum at (1, 1); on the way its curvature is negative in places."""

    def cost(place: Tensor) -> Tensor:
        x, y = place.T
        return (1 - x).square() + 100 * (y - x.square()).square()

    starts = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():  # as where maps are compared
        found = local_minima(cost, starts, 80)
    assert found == pytest.approx(torch.ones(4, 2, dtype=torch.float64), abs=1e-3)


def test_what_a_problem_finds_does_not_depend_on_the_others() -> None:
    def cost(place: Tensor) -> Tensor:
        return (place.square().sum(1) - 1).square() + torch.sin(3 * place).sum(1)

    starts = torch.tensor([[0.3, 0.1, -0.2], [2.0, -1.0, 0.5], [-0.7, 0.2, 1.1]])
    together = local_minima(cost, starts, 15)
    assert bool((cost(together) <= cost(starts)).all())
    for at in range(3):
        assert together[at] == pytest.approx(local_minima(cost, starts[at : at + 1], 15)[0], abs=1e-5)
