"""What many classifications of the same particles agree on: how many groups there are, and who belongs to which.

A start of K classes gives each particle a label. Labels of two starts cannot be compared by number, nor need K be the
number of structures; but whether two particles share a class can be told in every start, and how often they do is
their *co-assignment* (Strehl & Ghosh 2002). Its matrix has a row for each particle and is never made. Particles of the
same labels in all starts are one *tuple*; and co-assignment, each class weighted by one over its size, is Z Zᵀ with a
row of Z for each tuple and a column for each class of each start, so that its spectrum is that of the small matrix Zᵀ Z
(multiple correspondence analysis: Greenacre 1984). An eigenvalue is the share of a direction's variance that a start's
labels explain, on average over the starts: 1 for a distinction that all of them make, a start's own weight for one that
only this start makes, such as the halves into which it happens to split a structure. So k groups that starts agree on
give k - 1 eigenvalues near 1, however many classes each start has. In these directions the groups are the corners of a
simplex, and tuples are sorted to the nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from scalecryo.evaluate.classes import best_assignment, effective_classes

AGREED = 0.3  # of the way from a start's own weight to 1: from there on a distinction is no chance, and counts
LEAST_SHARE = 0.02  # of the particles, below which a group is no class of its own
DOUBTFUL = 0.5  # squared distance to the nearest group over that to the next, above which a tuple belongs to neither
DRAWS, ROUNDS = 6, 25  # of k-means
WIDTH, JUNK, LARGEST, SMALL = 0.6, 6.0, 10.0, 1 / 90  # of `start_weight`


@dataclass(frozen=True)
class LabelTuples:
    """Different rows of labels, and how many particles have each.

    Attributes:
        labels: from 0; -1 where a start was left out.
        count: of particles.
    """

    labels: Int[NDArray, "u j"]
    count: Int[NDArray, " u"]

    @classmethod
    def of(cls, labels: Int[NDArray, "n j"]) -> tuple["LabelTuples", Int[NDArray, " n"]]:
        """Those of some particles, and which of them each particle has."""
        unique, index, count = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        return cls(unique, count), index.reshape(-1)


@dataclass(frozen=True)
class Consensus:
    """What the starts agree on.

    Attributes:
        group: of each tuple, the largest group first; -1: of none.
        shares: of the particles that belong to a group, by group.
        unassigned: share of the particles that belong to none.
        eigenvalues: of the co-assignment, the largest first: what share of a distinction the starts make on average.
        threshold: from which on a distinction counts.
        together: probability that particles of two groups share a class in a start, over that within the groups.
        best: start and class whose particles agree best with each group.
        purity: of each start: share of its particles that belong to the majority of their class.
    """

    group: Int[NDArray, " u"]
    shares: Float[NDArray, " k"]
    unassigned: float
    eigenvalues: Float[NDArray, " e"]
    threshold: float
    together: Float[NDArray, "k k"]
    best: tuple[tuple[int, int], ...]
    purity: Float[NDArray, " j"]

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(self.shares)

    @property
    def confusion(self) -> float:
        """Of the two groups that starts take for one most often; 0 of one group."""
        apart = self.together[~np.eye(self.groups, dtype=bool)]
        return float(apart.max()) if len(apart) else 0.0


def start_weight(mass: Float[NDArray, " k"]) -> float:
    """How much a start counts: less if few of its classes are used, one holds most particles, or many are tiny.

    Args:
        mass: of the particles in each of its classes.
    """
    share = mass / max(float(mass.sum()), 1e-30)
    off = np.log(max(effective_classes(share), 1e-30) / len(share))
    tiny = float(share[share < SMALL].sum())
    return float(np.exp(-(off**2) / (2 * WIDTH**2) - LARGEST * tiny - JUNK * float(share.max())))


def consensus(
    tuples: LabelTuples, classes: Sequence[int], weights: Sequence[float], *, seed: int = 0, most: int = 64
) -> Consensus:
    """Groups of the particles, and their number.

    Args:
        tuples: of the labelled particles.
        classes: of each start.
        weights: of each start, up to a factor; 0: it does not count.
        seed: of the draws of k-means.
        most: groups at most.
    """
    weight = np.asarray(weights, dtype=np.float64) / max(float(np.sum(weights)), 1e-30)
    columns, mass = _columns(tuples, classes)
    indicator = _indicator(columns, len(mass))
    scale = np.sqrt(np.repeat(weight, classes) / np.maximum(mass, 1e-30)) * (mass > 0)
    z = (indicator - mass) * scale
    values, vectors = np.linalg.eigh((z * tuples.count[:, None]).T @ z / tuples.count.sum())
    values, vectors = values[::-1], vectors[:, ::-1]
    threshold = float(weight.max() + AGREED * (1 - weight.max()))
    kept = min(int((values > threshold).sum()), most - 1)
    place = z @ vectors[:, :kept] / np.sqrt(np.maximum(values[:kept], 1e-30))
    group = _sorted_out(place, tuples.count, kept + 1, np.random.default_rng(seed))
    return _described(tuples, group, classes, weight, indicator, values, threshold)


def _columns(tuples: LabelTuples, classes: Sequence[int]) -> tuple[Int[NDArray, "u j"], Float[NDArray, " c"]]:
    """Column of each label among the classes of all starts, and the share of the particles in each."""
    columns = tuples.labels + np.concatenate([[0], np.cumsum(classes)[:-1]])[None]
    mass = np.zeros(int(np.sum(classes)))
    np.add.at(mass, columns, tuples.count[:, None])
    return columns, mass / tuples.count.sum()


def _indicator(columns: Int[NDArray, "u j"], count: int) -> Float[NDArray, "u c"]:
    made = np.zeros((len(columns), count))
    np.put_along_axis(made, columns, 1.0, axis=1)
    return made


def _sorted_out(
    place: Float[NDArray, "u d"], count: Int[NDArray, " u"], groups: int, generator: np.random.Generator
) -> Int[NDArray, " u"]:
    """Nearest group of each tuple, the largest first; tiny groups are dissolved, and who lies between two has none."""
    centres = _means(place, count, groups, generator)
    while True:
        squared = _squared(place, centres)
        nearest = squared.argmin(1)
        if len(centres) == 1:
            return np.zeros(len(place), dtype=np.int64)
        first, second = np.partition(squared, 1, axis=1)[:, :2].T
        group = np.where(first <= DOUBTFUL * second, nearest, -1)
        held = np.array([count[group == number].sum() for number in range(len(centres))]) / count.sum()
        if held.min() >= LEAST_SHARE:
            order = np.argsort(-held, kind="stable")
            return np.where(group < 0, -1, np.argsort(order)[group])
        centres = np.delete(centres, held.argmin(), axis=0)


def _means(
    place: Float[NDArray, "u d"], count: Int[NDArray, " u"], groups: int, generator: np.random.Generator
) -> Float[NDArray, "k d"]:
    """Centres by k-means, the best of several draws (k-means++: Arthur & Vassilvitskii 2007)."""
    best, least = place[:1], np.inf
    for _ in range(DRAWS if groups > 1 else 1):
        centres = place[generator.choice(len(place), 1, p=count / count.sum())]
        while len(centres) < groups:
            far = count * _squared(place, centres).min(1)
            if far.sum() <= 0:
                break
            centres = np.concatenate([centres, place[generator.choice(len(place), 1, p=far / far.sum())]])
        for _ in range(ROUNDS):
            nearest = _squared(place, centres).argmin(1)
            held = np.stack([count * (nearest == number) for number in range(len(centres))])
            some = held.sum(1) > 0
            moved = (held[some] @ place) / held[some].sum(1, keepdims=True)
            if moved.shape == centres.shape and np.allclose(moved, centres):
                break
            centres = moved
        missed = float((count * _squared(place, centres).min(1)).sum())
        if missed < least:
            best, least = centres, missed
    return best


def _squared(place: Float[NDArray, "u d"], centres: Float[NDArray, "k d"]) -> Float[NDArray, "u k"]:
    """Squared distances."""
    found = (place**2).sum(1)[:, None] - 2 * place @ centres.T + (centres**2).sum(1)[None]
    return np.maximum(found, 0)


def _described(
    tuples: LabelTuples, group: Int[NDArray, " u"], classes: Sequence[int], weight: Float[NDArray, " j"],
    indicator: Float[NDArray, "u c"], values: Float[NDArray, " e"], threshold: float,
) -> Consensus:  # fmt: skip
    """The groups' sizes, what they share, and the class of a start that each is nearest to."""
    groups = int(group.max()) + 1
    counts = np.stack([(tuples.count * (group == number)) @ indicator for number in range(groups)])  # k × classes
    held = np.array([tuples.count[group == number].sum() for number in range(groups)])
    profile = counts / np.maximum(held, 1)[:, None]
    shared = (profile * np.repeat(weight, classes)) @ profile.T
    own = np.sqrt(np.maximum(np.diag(shared), 1e-30))
    union = held[:, None] + (tuples.count @ indicator)[None] - counts
    counted = np.repeat(weight > 0, classes)
    match = best_assignment((1e6 * counted * counts / np.maximum(union, 1)).astype(np.int64))
    starts = np.repeat(np.arange(len(classes)), classes)
    first = np.concatenate([[0], np.cumsum(classes)[:-1]])
    majority = counts.max(0)
    return Consensus(
        group=group,
        shares=held / max(int(held.sum()), 1),
        unassigned=1 - float(held.sum() / tuples.count.sum()),
        eigenvalues=values,
        threshold=threshold,
        together=shared / own[:, None] / own[None],
        best=tuple((int(starts[c]), int(c - first[starts[c]])) for c in match),
        purity=np.bincount(starts, majority, len(classes)) / max(int(held.sum()), 1),
    )
