"""The frame of a latent space: what turning it must not change, and the shrinkage of shells in closed form."""

import torch

from scalecryo.map.component_frame import common_frame, ridge_of, scaled, without_mean

BOX, Q = 8, 3


def volumes(seed: int) -> torch.Tensor:
    return torch.randn(Q, BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def covariance(components: torch.Tensor) -> torch.Tensor:
    flat = components.flatten(1)
    return flat.T @ flat


def test_halves_that_differ_by_a_turn_agree_and_keep_their_covariance() -> None:
    first = volumes(0)
    turn = torch.linalg.qr(torch.randn(Q, Q, generator=torch.Generator().manual_seed(1)))[0]
    second = torch.einsum("kl,kzyx->lzyx", turn, first)
    frame = common_frame(torch.stack([first, second]))
    torch.testing.assert_close(frame.agreement, torch.ones(Q), atol=1e-4, rtol=0)
    torch.testing.assert_close(frame.fsc[:, 1:], torch.ones(Q, BOX // 2), atol=1e-3, rtol=0)
    for half, own in zip(frame.components, (first, second), strict=True):
        # W Wᵀ is what the model says of the maps; singular values are the components' norms.
        torch.testing.assert_close(covariance(half), covariance(own), atol=1e-3, rtol=1e-4)
    values = torch.linalg.svdvals(first.flatten(1)).square()
    torch.testing.assert_close(frame.variance, values, rtol=1e-4, atol=1e-3)


def test_independent_halves_do_not_agree() -> None:
    frame = common_frame(torch.stack([volumes(0), volumes(7)]))
    # Three directions of 512 voxels, turned at will: correlations of some sqrt(3 · 2 / 512).
    assert float(frame.agreement.abs().max()) < 0.25


def test_second_moments_are_absorbed() -> None:
    spread = torch.randn(Q, Q, generator=torch.Generator().manual_seed(2))
    moment, own = spread @ spread.T, volumes(3)
    flat = own.flatten(1)
    torch.testing.assert_close(covariance(scaled(own, moment)), flat.T @ moment @ flat, rtol=1e-3, atol=1e-3)


def test_nothing_along_the_mean_is_left() -> None:
    mean, mask = volumes(4)[0], torch.ones(BOX, BOX, BOX)
    left = without_mean(volumes(5), mean, mask)
    assert float((left * mean).sum((1, 2, 3)).abs().max()) < 1e-3  # of norms of some 500, in single precision


def test_the_ridge_shrinks_a_shell_by_its_correlation() -> None:
    weight, curve = torch.full((1, 6), 5.0), torch.full((1, 6), 0.6)
    ridge = ridge_of(curve, weight)
    torch.testing.assert_close(weight / (weight + ridge), torch.full_like(weight, 0.6))
