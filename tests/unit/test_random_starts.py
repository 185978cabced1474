"""Random starts: whose turn it is, who goes on, and how well two are told apart by the same images."""

import pytest
import torch

from scalecryo.settings import AutoencoderConfig
from scalecryo.train.forecast import _of_random_starts
from scalecryo.train.random_starts import MOST_ALONE, PairedGains, RandomStarts


def run(starts: RandomStarts, goodness: dict[int, float]) -> tuple[list[list[int]], int]:
    """Train and judge until one is left; who learnt in each round, and steps learnt in all."""
    rounds, steps = [], 0
    while not starts.over:
        rounds.append(list(starts.going))
        while not starts.over and not starts.judging:
            steps += starts.next_steps
            starts.learnt({"number": starts.current})
        if not starts.over:
            starts.judged(torch.tensor([goodness[number] for number in starts.going]))
    return rounds, steps


def test_the_better_half_goes_on_each_round() -> None:
    goodness = dict(enumerate([3.0, 9.0, 1.0, 7.0, 8.0, 2.0, 5.0, 4.0]))
    starts = RandomStarts(8, 80, 600)
    rounds, steps = run(starts, goodness)
    assert rounds == [list(range(8)), [1, 3, 4, 6], [1, 4]]
    assert starts.going == [1]
    assert starts.states == {1: {"number": 1}}
    assert starts.steps == 240
    assert steps == (8 + 4 + 2) * 80


@pytest.mark.parametrize(("count", "most"), [(1, 600), (2, 600), (5, 600), (8, 600), (8, 100), (4, 160)])
def test_none_learns_longer_than_it_may_and_the_forecast_knows(count: int, most: int) -> None:
    starts = RandomStarts(count, 80, most)
    _, steps = run(starts, dict.fromkeys(range(count), 0.0))
    assert starts.steps <= most
    assert len(starts.going) == 1
    settings = AutoencoderConfig(starts=count, start_steps=80, steps=most)
    assert _of_random_starts(settings)[1] == steps - starts.steps


def test_the_best_one_learns_on_alone_while_it_gains() -> None:
    # Gains of a start by its steps, of the fourth a tenth more: 20, 15 and 10 % more a round, then 1 %.
    curve = [40.0, 48.0, 55.2, 60.7, 61.3, 70.0]
    starts, seen, places = RandomStarts(4, 80, 600), 0, []
    while not starts.over:
        while not starts.judging:
            places.append(starts.place(79))
            starts.learnt({})
        starts.judged(torch.tensor([curve[seen] * (1.1 if number == 3 else 1.0) for number in starts.going]))
        seen += 1
    assert starts.going == [3]
    assert seen == 5  # two rounds of several, then those that gained 15, 10 and 1 %
    assert starts.rounds_alone == 3
    assert places == [79] * 4 + [159] * 2 + [160] * 3  # alone it stays where it is in the march
    assert starts.steps == 160


def test_alone_it_ends_after_so_many_rounds_and_is_taken_up_there() -> None:
    starts = RandomStarts(4, 80, 600)
    value = 1.0
    while not starts.over:
        again = RandomStarts(4, 80, 600)
        again.load_state_dict(starts.state_dict())
        starts = again
        while not starts.judging:
            starts.learnt({})
        value *= 2
        starts.judged(torch.full((len(starts.going),), value))
    assert starts.rounds_alone == MOST_ALONE
    assert starts.steps == 160


def test_without_a_gain_nobody_learns_on() -> None:
    starts = RandomStarts(4, 80, 600)
    run(starts, dict.fromkeys(range(4), -3.0))
    assert starts.rounds_alone == 0


def test_it_is_taken_up_where_it_stood() -> None:
    goodness = dict(enumerate([1.0, 4.0, 3.0, 2.0]))
    whole, cut = RandomStarts(4, 10, 100), RandomStarts(4, 10, 100)
    for _ in range(4):
        cut.learnt({"number": cut.current})
    cut.judged(torch.tensor([goodness[number] for number in cut.going]))
    cut.learnt({"number": cut.current})
    again = RandomStarts(4, 10, 100)
    again.load_state_dict(cut.state_dict())
    assert (again.going, again.current, again.steps) == ([1, 2], 2, 10)
    run(whole, goodness)
    run(again, goodness)
    assert (again.going, again.steps) == (whole.going, whole.steps) == ([1], 20)


def test_what_images_have_in_common_cancels_in_the_error_of_a_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 30 * torch.randn(500, generator=generator)
    gains = torch.stack([common, common + 1 + torch.randn(500, generator=generator)])
    weight = (torch.arange(500) % 5 > 0).float()
    paired = PairedGains(2, "cpu")
    for part in range(5):  # batches, as workers would
        paired.add(gains[:, part::5], weight[part::5])
    kept = gains[:, weight > 0].double()
    assert paired.mean().tolist() == pytest.approx(kept.mean(1).tolist())
    # Textbook: the standard deviation of the differences over the root of their number.
    difference = kept[1] - kept[0]
    assert paired.error(1, 0) == pytest.approx(float(difference.std(correction=0)) / len(difference) ** 0.5, rel=1e-6)
    assert paired.error(1, 0) < 0.06 < float(kept[0].std()) / 20
