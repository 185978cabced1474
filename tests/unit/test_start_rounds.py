"""What a start goes on with: gains, agreements and reaches (shares of the compared radius) as they were measured."""

import numpy as np
import pytest
import torch

from scalecryo.train.stages.bootstrap import standing_errors
from scalecryo.train.stages.start_course import Choice, StartCourse, quiet


@pytest.mark.parametrize(
    ("gains", "agreement", "ends"),
    [
        ([97.4], 0.87, False),  # a first round is never the last
        ([56.1, 61.4], 0.95, False),
        ([56.1, 61.4, 62.1], 0.98, True),  # CMG helicase
        ([97.4, 100.8, 102.4], 0.83, False),  # β-galactosidase, sheared by 9°
        ([97.4, 100.8, 102.4, 105.2, 106.2], 0.86, True),  # much less so
        ([2.9, 3.0, 3.2, 3.2], 0.70, True),
    ],
)
def test_a_round_is_quiet_that_brings_next_to_nothing(gains: list[float], agreement: float, ends: bool) -> None:
    assert quiet(gains, agreement) == ends


def course_of(rounds: list[tuple[float, float, float]]) -> list[str]:
    """What follows each round of a gain, a reach and a lead."""
    course, gains, told = StartCourse(), [], []
    for gain, reach, lead in rounds:
        gains.append(gain)
        course.update(gains, Choice(torch.zeros(2, 2, 2, 2), 0.7, reach, lead, ""))
        told.append("ended" if course.ended else "all images" if course.pooled else "apart")
        told[-1] += ", from the best" if course.taken_over else ""
    return told


def test_halves_that_are_alike_end_with_the_first_quiet_round() -> None:
    # Part of 6ZU5, 1,500 images at -12 dB: right from the second round on.
    assert course_of([(20.4, 0.9, 3.0), (22.1, 1.0, 1.5), (22.2, 1.0, 0.8)]) == ["apart", "apart", "ended"]


def test_halves_that_stay_unlike_learn_from_all_images_until_a_map_leads() -> None:
    # Part of 6ZU5, 1,500 images at -10 dB, a fifth junk: wrong in each half; then one map finds the structure.
    stuck = [(15.6, 0.25, 0.4), (16.2, 0.4, 0.2), (16.2, 0.4, 0.9)]
    pooled = [(16.8, 0.4, 0.5), (17.3, 0.4, 1.2), (20.2, 0.4, 6.0)]
    after = [(20.3, 1.0, 0.5), (20.4, 1.0, 0.3)]
    assert course_of(stuck + pooled + after) == [
        "apart", "apart", "all images", "all images", "all images", "apart, from the best", "apart", "ended",
    ]  # fmt: skip


def test_maps_of_all_images_that_are_alike_go_on_apart_and_must_stay_alike() -> None:
    # Alike by the noise that they share: unlike again once apart.
    unlike, chance = (16.2, 0.4, 0.2), (16.8, 0.7, 0.5)
    told = course_of([unlike, unlike, unlike, chance, unlike, unlike, unlike])
    assert told == ["apart", "apart", "all images", "apart", "apart", "apart", "all images"]


def test_standing_errors_are_those_of_the_mean_and_of_the_paired_difference() -> None:
    # Reference: numpy's, of each image's gains.
    gains = np.random.default_rng(3).normal([[5.0], [4.0], [4.5]], [[2.0], [1.0], [3.0]], (3, 200))
    gains[1] += gains[0]
    every = torch.cat([torch.from_numpy(gains), torch.ones(1, 200, dtype=torch.float64)])
    error, lead = standing_errors(every @ every.T, 1, 0)
    apart = gains[1] - gains[0]
    assert error == pytest.approx(gains[1].std() / 200**0.5)
    assert lead == pytest.approx(apart.mean() / (apart.std() / 200**0.5))
