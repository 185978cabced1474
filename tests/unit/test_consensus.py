"""What starts agree on, on label tuples whose groups are known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scalecryo.evaluate.classes import compare_classes
from scalecryo.evaluate.consensus import Consensus, LabelTuples, consensus, start_weight

KINDS = (4, 8, 16, 4, 8, 16, 4, 8, 16, 4, 8, 16)


def found(labels: NDArray[np.int64], classes: tuple[int, ...], **more: int) -> tuple[Consensus, NDArray[np.int64]]:
    """With even weights; and the group of each particle."""
    tuples, index = LabelTuples.of(labels)
    result = consensus(tuples, classes, np.ones(len(classes)).tolist(), **more)
    return result, result.group[index]


def planted(
    rng: np.random.Generator, truth: NDArray[np.int64], noise: float, classes: tuple[int, ...] = KINDS
) -> NDArray[np.int64]:
    """Each start lays its classes on the groups in turn, under numbers of its own: a group of several classes is split
    at random; some labels are drawn anew."""
    columns = []
    for k in classes:
        names, groups = rng.permutation(k), int(truth.max()) + 1
        each = [np.arange(group, k, groups) if group < k else np.array([group % k]) for group in range(groups)]
        label = np.array([names[rng.choice(each[group])] for group in truth])
        columns.append(np.where(rng.random(len(truth)) < noise, rng.integers(0, k, len(truth)), label))
    return np.stack(columns, 1)


def test_full_agreement_and_none_have_the_spectra_of_their_closed_form() -> None:
    # Closed form: J starts that agree on k groups, whatever their shares: 1, k - 1 times, then 0. Labels that are
    # independent: 1/J, once for each class of each start but one.
    truth = np.repeat([0, 1, 2], [60, 30, 10])
    agreed, group = found(np.stack([truth] * 4, 1), (3, 3, 3, 3))
    assert agreed.eigenvalues[:2] == pytest.approx([1, 1])
    assert agreed.eigenvalues[2:] == pytest.approx(0, abs=1e-12)
    assert agreed.shares == pytest.approx([0.6, 0.3, 0.1])
    assert (group == truth).all()
    every = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), -1).reshape(-1, 4)
    independent, _ = found(every, (3, 3, 3, 3))
    assert independent.eigenvalues[:8] == pytest.approx(0.25)
    assert independent.eigenvalues[8:] == pytest.approx(0, abs=1e-12)
    assert independent.groups == 1
    assert independent.unassigned == 0
    assert independent.confusion == 0


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("groups", [2, 4, 5])
def test_planted_groups_are_found_whatever_the_classes_of_the_starts(groups: int, noise: float) -> None:
    # Reference: the planted groups, 10 to 30 % each; starts of 4 classes take two of five groups for one.
    rng = np.random.default_rng(groups)
    share = np.linspace(1, 3, groups)
    truth = rng.choice(groups, 3000, p=share / share.sum())
    result, group = found(planted(rng, truth, noise), KINDS)
    assert result.groups == groups
    assert result.unassigned < 0.05
    kept = group >= 0
    assert compare_classes(group[kept] + 1, truth[kept] + 1).accuracy > 0.97
    assert (np.diff(result.shares) <= 0).all()
    assert result.confusion < 0.6


def test_numbers_of_classes_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    truth = rng.choice(4, 2000)
    labels = planted(rng, truth, 0.15)
    renamed = np.stack([rng.permutation(k)[column] for k, column in zip(KINDS, labels.T, strict=True)], 1)
    (one, first), (other, second) = found(labels, KINDS), found(renamed, KINDS)
    assert one.eigenvalues == pytest.approx(other.eigenvalues)
    assert one.groups == other.groups == 4
    assert compare_classes(first + 1, second + 1).accuracy == 1


def test_labels_of_noise_and_of_one_structure_split_at_random_are_one_group() -> None:
    rng = np.random.default_rng(2)
    labels = np.stack([rng.integers(0, k, 3000) for k in KINDS], 1)
    result, group = found(labels, KINDS)
    assert result.groups == 1
    assert (group == 0).all()


def test_junk_is_its_own_group_a_tiny_one_is_none_and_scattered_labels_are_unassigned() -> None:
    rng = np.random.default_rng(3)
    truth = np.repeat([0, 1, 2], [1000, 1000, 250])  # the third: junk that starts put into one class
    labels = planted(rng, truth, 0.05)
    result, _ = found(labels, KINDS)
    assert result.groups == 3
    assert result.shares[2] == pytest.approx(250 / 2250, abs=0.02)
    few = np.concatenate([np.flatnonzero(truth < 2), np.flatnonzero(truth == 2)[:15]])  # 0.7 % of the particles
    result, group = found(labels[few], KINDS)
    assert result.groups == 2
    assert compare_classes(group[:2000][group[:2000] >= 0] + 1, truth[:2000][group[:2000] >= 0] + 1).accuracy > 0.99
    scattered = np.concatenate([labels[:2000], np.stack([rng.integers(0, k, 300) for k in KINDS], 1)])
    result, group = found(scattered, KINDS)
    assert result.groups == 2
    assert (group[:2000] >= 0).mean() > 0.98
    assert (group[2000:] < 0).mean() > (group[:2000] < 0).mean() + 0.3


def test_the_class_nearest_to_each_group_and_what_a_start_mixes() -> None:
    # One start tells three groups apart, two tell the first from the others; three more say as the first.
    truth = np.repeat([0, 1, 2], [50, 30, 20])
    right, mixing = truth[:, None], np.where(truth == 0, 0, 1)[:, None]
    result, _ = found(np.concatenate([2 - right, mixing, right, mixing, right, right], 1), (3, 2, 3, 2, 3, 3))
    assert result.groups == 3
    starts = (0, 2, 4, 5)
    assert all(start in starts for start, _ in result.best[1:])  # group 1 has classes of its own in mixing ones too
    assert [number for start, number in result.best if start == 0] in ([], [2], [1], [0], [2, 1], [1, 0], [2, 1, 0])
    assert result.purity == pytest.approx([1, 0.8, 1, 0.8, 1, 1])
    # Particles of groups 2 and 3 share a class in two of six starts, those of one group in all.
    assert result.together[1, 2] == pytest.approx(2 / 6)
    assert result.confusion == pytest.approx(2 / 6)
    assert result.together[0, 1:] == pytest.approx(0)


def test_a_start_without_weight_does_not_count() -> None:
    rng = np.random.default_rng(4)
    truth = rng.choice(3, 900)
    labels = planted(rng, truth, 0.05, (4, 4, 4, 4, 4))
    labels[:, 0] = 0
    tuples, _ = LabelTuples.of(labels)
    weighted = consensus(tuples, (4, 4, 4, 4, 4), (0.0, 1, 1, 1, 1))
    alone = consensus(LabelTuples.of(labels[:, 1:])[0], (4, 4, 4, 4), (1, 1, 1, 1))
    assert weighted.groups == alone.groups == 3
    assert weighted.eigenvalues[:4] == pytest.approx(alone.eigenvalues[:4])
    assert all(start > 0 for start, _ in weighted.best)


def test_weights_of_starts() -> None:
    # Closed form: all classes even: exp(-6/K); one of four holds all: exp(-(ln 4)²/(2 0.6²) - 6).
    assert start_weight(np.ones(8)) == pytest.approx(np.exp(-6 / 8))
    assert start_weight(np.array([5.0, 0, 0, 0])) == pytest.approx(np.exp(-(np.log(4) ** 2) / 0.72 - 6))
    # 1 % in a class below 1/90: exp(-10 0.01) of it.
    some = np.array([0.5, 0.49, 0.01])
    effective = 1 / np.square(some).sum()
    assert start_weight(some) == pytest.approx(np.exp(-(np.log(effective / 3) ** 2) / 0.72 - 0.1 - 3))
