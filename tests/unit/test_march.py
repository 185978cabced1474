"""The auto-encoder's march: a pure function of the step, through all levels, never back."""

from scalecryo.train.march import FIRST_RADIUS, March


def test_radius_rises_through_all_levels() -> None:
    march = March((128, 32, 64), 40, 20)
    places = [march.at(step) for step in range(march.steps)]
    assert march.steps == 80
    assert [place.level for place in places] == [32] * 40 + [64] * 20 + [128] * 20
    radii = [place.radius for place in places]
    assert radii == sorted(radii)
    assert radii[0] == FIRST_RADIUS
    assert [radii[step] for step in (39, 59, 79)] == [15.0, 31.0, 63.0]  # each level's last shell


def test_maps_are_solved_less_often_where_that_costs_more_but_before_every_change_of_level() -> None:
    march = March((32, 64, 128), 12, 12)
    solved = [[march.at(start + step).refresh for step in range(12)] for start in (0, 12, 24)]
    assert [sum(level) for level in solved] == [12, 7, 4]
    assert all(level[-1] for level in solved)


def test_passes_end_with_their_level() -> None:
    march = March((32, 64), 10, 5)
    assert [march.rest(step) for step in (0, 9, 10, 14)] == [10, 1, 5, 1]
