"""Labels against true ones, shares of classes and their prior, classes that are the same."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from scalecryo.data.selection.partition import Partition
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.classes import best_assignment, compare_classes
from scalecryo.physics.rotation import random_rotations
from scalecryo.train.stages.class_shares import Balance, alike, floored
from tests.support.blobs import blobs


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 6), (6, 4), (7, 7)])
def test_the_assignment_is_the_best_one(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(shape[0])
    for _ in range(20):
        score = generator.integers(0, 40, shape)
        rows, columns = linear_sum_assignment(-score)  # reference: SciPy's
        found = best_assignment(score)
        assert sum(score[row, own] for row, own in enumerate(found) if own >= 0) == score[rows, columns].sum()
        used = found[found >= 0]
        assert len(set(used)) == len(used) == min(shape)


def test_labels_are_compared_whatever_their_names() -> None:
    true = np.array([1, 1, 1, 2, 2, 2, 2, 3])
    estimated = np.array([2, 2, 2, 1, 1, 3, 3, 4])
    found = compare_classes(estimated, true)
    assert found.confusion.tolist() == [[0, 3, 0, 0], [2, 0, 2, 0], [0, 0, 0, 1]]
    assert found.partner[0] == 1
    assert found.partner[2] == 3
    assert found.accuracy == 6 / 8  # the second class was split
    assert found.purity == 1.0  # and none was mixed


def test_small_classes_keep_a_prior() -> None:
    share = floored(torch.tensor([[98.0, 2.0, 0.0, 0.0]]))
    torch.testing.assert_close(share.sum(1), torch.ones(1))
    assert float(share[0, 3]) == pytest.approx(0.05 / 1.13)  # a fifth of an even share, before scaling


def test_the_prior_draws_classes_to_even_shares() -> None:
    # Images whose evidence is 4 nats higher in the first class: its share under the prior p is that of Bayes' rule.
    balance, evidence = Balance(1, 2, "cpu"), torch.tensor([4.0, 0.0], dtype=torch.float64)
    for _ in range(80):
        share = (evidence + balance.log_prior[0]).softmax(0)
        balance.add(100 * share[None], 0.9, even=True)
    assert float(share[0]) == pytest.approx(0.5, abs=0.02)
    balance.add(torch.tensor([[50.0, 50.0]], dtype=torch.float64), 0.9, even=False)
    torch.testing.assert_close(balance.log_prior.exp(), floored(balance.mass))


def test_a_class_in_another_frame_and_hand_is_the_same() -> None:
    first, second = blobs(32, 1), blobs(32, 2)
    turn = random_rotations(1, torch.Generator().manual_seed(3))[0]
    moved = apply_alignment(first, Alignment(turn, True, torch.tensor([1.0, 0.0, -1.0]), 0.0))
    assert alike([first, second, moved, torch.zeros_like(first)], [0.3, 0.3, 0.35, 0.05]) == [True, False, False, False]


def test_random_labels_are_even_and_others_for_each_draw() -> None:
    rows, partition = torch.arange(6000), Partition()
    draws = [partition.label(rows, number, 3) for number in range(2)]
    for label in draws:
        # 2,000 expected of each; five standard deviations of a fair draw.
        assert (torch.bincount(label, minlength=3) - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5
    agree = (draws[0] == draws[1]).double().mean()
    assert float(agree) == pytest.approx(1 / 3, abs=0.04)
    same = (partition.part(rows) == partition.label(rows, 0, 4)).double().mean()
    assert float(same) == pytest.approx(1 / 4, abs=0.04)
