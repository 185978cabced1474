"""Mixtures against sklearn-free closed forms: one state is mean and covariance; BIC finds what was drawn."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from scalecryo.evaluate.mixture import best_mixture, fit_mixture


def test_one_state_is_the_points_mean_and_covariance() -> None:
    points = np.random.default_rng(0).normal(size=(500, 3)) @ np.diag([1.0, 2.0, 0.5]) + [1, 2, 3]
    found = fit_mixture(points, 1, 0)
    np.testing.assert_allclose(found.mean[0], points.mean(0), atol=1e-9)
    # A thousandth of each variance is added, and np.cov divides by n − 1.
    expected = np.cov(points.T) * 499 / 500 + 1e-3 * np.diag(np.cov(points.T).diagonal())
    np.testing.assert_allclose(found.covariance[0], expected, rtol=1e-6, atol=1e-9)
    sign, log = np.linalg.slogdet(2 * np.pi * found.covariance[0])
    away = points - found.mean[0]
    likelihood = -0.5 * (sign * log + np.einsum("ni,ij,nj->n", away, np.linalg.inv(found.covariance[0]), away).mean())
    assert found.log_likelihood == pytest.approx(likelihood, abs=1e-9)
    assert found.bic == pytest.approx(-1000 * likelihood + 9 * np.log(500), abs=1e-6)


def test_as_many_states_as_were_drawn_with_their_shares() -> None:
    rng = np.random.default_rng(1)
    label = rng.choice(3, p=[0.6, 0.3, 0.1], size=2000)
    points = rng.normal(size=(2000, 2)) * 0.4 + np.array([[0, 0], [3, 0], [0, 3]])[label]
    found = best_mixture(points, 8, 0)
    assert len(found) == 3
    # Binomial standard deviations are about 0.01.
    np.testing.assert_allclose(found.share, [0.6, 0.3, 0.1], atol=0.04)
    state, probability = found.likeliest(points)
    assert np.mean(state == label) > 0.99
    # Bayes' rule written out.
    joint = np.stack([
        share * multivariate_normal(mean, covariance).pdf(points)
        for share, mean, covariance in zip(found.share, found.mean, found.covariance, strict=True)
    ], 1)  # fmt: skip
    np.testing.assert_allclose(probability, (joint / joint.sum(1, keepdims=True)).max(1), rtol=1e-9)
    assert len(best_mixture(rng.normal(size=(2000, 2)), 8, 0)) == 1
