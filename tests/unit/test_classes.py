"""Labels against true ones, shares of classes and their prior, classes that are the same."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from scalecryo.data.selection.partition import Partition
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.classes import best_assignment, compare_classes, effective_classes
from scalecryo.evaluate.likeness import alike, likeness
from scalecryo.physics.fsc import fsc
from scalecryo.physics.rotation import random_rotations
from scalecryo.train.stages.class_shares import Balance, floored
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
    maps, certain = [first, second, moved, torch.zeros_like(first)], torch.ones(17)
    found = alike(maps, [certain] * 4, [0.3, 0.3, 0.35, 0.05], slice(2, 9), 0.9)
    assert found == [2, None, None, None]


def test_maps_of_one_structure_are_as_alike_as_their_halves_say() -> None:
    # Halves of white noise of variance s² a voxel about the same density: the mean of two has half of it, and means of
    # two classes correlate by C = 2 FSC / (1 + FSC) of their halves, so that the likeness is 1.
    density, generator = blobs(32, 1), torch.Generator().manual_seed(4)
    halves = [density + 0.15 * torch.randn(density.shape, generator=generator) for _ in range(4)]
    curves = fsc(halves[0], halves[1]), fsc(halves[2], halves[3])
    assert float(curves[0][8:10].mean()) < 0.9  # the noise is seen
    same = likeness((halves[0] + halves[1]) / 2, (halves[2] + halves[3]) / 2, curves, slice(2, 10))
    assert same == pytest.approx(1.0, abs=0.03)  # some 300 coefficients in a shell
    other = likeness((halves[0] + halves[1]) / 2, blobs(32, 2), (curves[0], torch.ones(17)), slice(2, 10))
    assert other < 0.8


def test_a_class_that_was_given_up_stays_empty() -> None:
    balance = Balance(1, 3, "cpu")
    balance.add(torch.tensor([[50.0, 30.0, 20.0]], dtype=torch.float64), 0.9, even=False)
    balance.give_up(0, torch.tensor([2]))
    for even in (True, False):
        balance.add(torch.tensor([[60.0, 40.0, 0.0]], dtype=torch.float64), 0.9, even=even)
        assert balance.log_prior[0, :2].isfinite().all()
        assert balance.log_prior[0, 2] == -torch.inf


def test_the_effective_number_of_classes() -> None:
    assert effective_classes(np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(4)
    assert effective_classes(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)
    assert effective_classes(np.zeros(3)) == 0


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
