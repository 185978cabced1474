"""Estimated classes against true ones: which belongs to which, and how many particles are where they should be."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassComparison:
    """How particles of each true class were sorted.

    Attributes:
        confusion: particles by true class (rows) and estimated class (columns), both from 1.
        partner: estimated class of each true one, from 0, one to one so that most particles agree; -1: none is left.
        accuracy: share of the particles in the partner of their class.
        purity: share of the particles that belong to the majority of their estimated class: what is left of the
            accuracy's loss is classes that were split, not mixed.
    """

    confusion: Int[NDArray, "t e"]
    partner: Int[NDArray, " t"]
    accuracy: float
    purity: float


def compare_classes(estimated: Int[NDArray, " n"], true: Int[NDArray, " n"]) -> ClassComparison:
    """Compare labels, from 1, particle by particle."""
    confusion = np.zeros((int(true.max()), int(estimated.max())), dtype=np.int64)
    np.add.at(confusion, (true - 1, estimated - 1), 1)
    partner = best_assignment(confusion)
    matched = sum(int(row[own]) for row, own in zip(confusion, partner, strict=True) if own >= 0)
    return ClassComparison(confusion, partner, matched / len(true), float(confusion.max(0).sum() / len(true)))


def effective_classes(share: Float[NDArray, " k"]) -> float:
    """1 / sum of squared shares: as many classes of even shares would be as varied (Simpson 1949); 0 of nothing."""
    whole = share.sum()
    return float(whole**2 / np.square(share).sum()) if whole > 0 else 0.0


def best_assignment(score: Int[NDArray, "t e"]) -> Int[NDArray, " t"]:
    """One column for each row, none twice, so that the scores' sum is largest; -1 where there are too few columns.

    Shortest augmenting paths with potentials (Kuhn 1955, Jonker & Volgenant 1987), in n³ steps.
    """
    size = max(score.shape)
    cost = np.zeros((size + 1, size + 1))
    cost[1 : score.shape[0] + 1, 1 : score.shape[1] + 1] = -score
    row_potential, column_potential = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # 0: the column is free
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        distance, before = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column]:
            done[column] = True
            own = row_of[column]
            reduced = cost[own] - row_potential[own] - column_potential
            closer = ~done & (reduced < distance)
            distance[closer], before[closer] = reduced[closer], column
            nearest = int(np.where(done, np.inf, distance).argmin())
            step = distance[nearest]
            row_potential[row_of[done]] += step
            column_potential[done] -= step
            distance[~done] -= step
            column = nearest
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.full(size, -1, dtype=np.int64)
    found[row_of[1:] - 1] = np.arange(size)
    found = found[: score.shape[0]]
    return np.where(found < score.shape[1], found, -1)
