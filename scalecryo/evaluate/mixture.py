"""Mixtures of normal distributions by expectation maximisation, and how many the data ask for (BIC)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

STARTS, PASSES, SETTLED = 2, 100, 1e-4
PATIENCE = 3  # numbers of states in a row that are no better, before none more are tried
AT_ONCE = 100_000


@dataclass(frozen=True)
class Mixture:
    """K states of points in q dimensions.

    Attributes:
        share: of the points, the largest first.
        mean: of each state.
        covariance: of each state.
        log_likelihood: of the points that it was fitted to, per point.
        bic: Bayesian information criterion, smaller for better (Schwarz 1978).
    """

    share: Float[NDArray, " k"]
    mean: Float[NDArray, "k q"]
    covariance: Float[NDArray, "k q q"]
    log_likelihood: float
    bic: float

    def __len__(self) -> int:
        return len(self.share)

    def likeliest(self, points: Float[NDArray, "n q"]) -> tuple[Int[NDArray, " n"], Float[NDArray, " n"]]:
        """The likeliest state of each point, from 0, and its probability."""
        state, probability = np.empty(len(points), dtype=np.int64), np.empty(len(points))
        for start in range(0, len(points), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            weight, _ = _responsibility(points[some], self.share, self.mean, self.covariance)
            state[some], probability[some] = weight.argmax(1), weight.max(1)
        return state, probability


def best_mixture(points: Float[NDArray, "n q"], most: int, seed: int) -> Mixture:
    """The mixture of 1 … `most` states with the smallest BIC; more are not tried when three in a row are worse."""
    best, since = fit_mixture(points, 1, seed), 0
    for states in range(2, most + 1):
        if len(points) < 10 * states * points.shape[1]:
            break
        found = fit_mixture(points, states, seed)
        since = 0 if found.bic < best.bic else since + 1
        best = min(best, found, key=lambda one: one.bic)
        if since == PATIENCE:
            break
    return best


def fit_mixture(points: Float[NDArray, "n q"], states: int, seed: int) -> Mixture:
    """A mixture of so many states with full covariances, the likeliest of three starts (k-means++)."""
    points = np.asarray(points, dtype=np.float64)
    found = [_fit(points, states, np.random.default_rng([seed, states, start])) for start in range(STARTS)]
    return max(found, key=lambda one: one.log_likelihood)


def _fit(points: NDArray, states: int, generator: np.random.Generator) -> Mixture:
    count, size = points.shape
    whole = np.cov(points.T).reshape(size, size)
    floor = 1e-3 * np.diag(whole.diagonal())
    mean = _seeds(points, states, generator)
    share, covariance = np.full(states, 1 / states), np.tile(whole / states ** (2 / size) + floor, (states, 1, 1))
    before = -np.inf
    for _ in range(PASSES):
        weight, likelihood = _responsibility(points, share, mean, covariance)
        if likelihood - before < SETTLED:
            break
        before = likelihood
        mass = weight.sum(0) + 1e-9
        share, mean = mass / mass.sum(), weight.T @ points / mass[:, None]
        for number in range(states):
            away = points - mean[number]
            covariance[number] = (weight[:, number, None] * away).T @ away / mass[number] + floor
    order = np.argsort(-share)
    free = states * (1 + size + size * (size + 1) // 2) - 1
    bic = -2 * count * likelihood + free * np.log(count)
    return Mixture(share[order], mean[order], covariance[order], float(likelihood), float(bic))


def _seeds(points: NDArray, states: int, generator: np.random.Generator) -> NDArray:
    """Points far from each other (Arthur & Vassilvitskii 2007), in units of each direction's spread."""
    scaled = points / (points.std(0) + 1e-12)
    chosen = [int(generator.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    for _ in range(states - 1):
        nearest = np.minimum(nearest, np.square(scaled - scaled[chosen[-1]]).sum(1))
        chosen.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
    return points[chosen]


def _responsibility(
    points: NDArray, share: NDArray, mean: NDArray, covariance: NDArray
) -> tuple[Float[NDArray, "n k"], float]:
    """Probability of each state for each point, and the points' mean log-likelihood."""
    size = points.shape[1]
    log = np.empty((len(points), len(share)))
    for number in range(len(share)):
        factor = np.linalg.cholesky(covariance[number])
        away = np.linalg.solve(factor, (points - mean[number]).T)
        log[:, number] = np.log(share[number] + 1e-300) - 0.5 * np.square(away).sum(0) - np.log(factor.diagonal()).sum()
    log -= 0.5 * size * np.log(2 * np.pi)
    top = log.max(1, keepdims=True)
    weight = np.exp(log - top)
    total = weight.sum(1, keepdims=True)
    return weight / total, float((np.log(total) + top).mean()) if len(points) else 0.0
