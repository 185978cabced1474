"""What each iteration of the refinement does, against what was measured to be needed."""

import pytest

from scalecryo.train.stages.schedule import IterationPlan, Schedule, plan_iteration

LEVELS = (32, 64, 128)


def plan(schedule: Schedule) -> IterationPlan:
    return schedule.plan(LEVELS, shifted=True, extent=0.75)


def update(schedule: Schedule, **found: float | None) -> None:
    told = {
        "exchanging": False, "creep": 0.0, "weighted": False, "even": False, "reach": 20.0, "gain": 1.0, "moved": 0.0,
        "restless": 0.0, "found_again": None, "evidence": 100.0,
    } | found  # fmt: skip
    schedule.update(plan(schedule), **told)  # type: ignore[arg-type]


def test_radius_goes_to_where_the_signal_ends_at_once() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    assert plan(schedule).radius == 14
    update(schedule, reach=60.0, moved=None)
    assert plan(schedule).radius == pytest.approx(1.4 * 14 + 6)  # as far as images were inserted
    schedule.searched = False
    update(schedule, reach=28.0)
    assert plan(schedule).radius == 30  # two shells beyond the signal
    update(schedule, reach=20.0)
    assert plan(schedule).radius == 30  # and not back


def test_search_goes_on_while_particles_jump_or_the_map_gets_better() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    for moved, gain, searched in (
        (None, None, True), (0.5, 1.3, True), (0.3, 1.0, True), (0.29, 1.1, True), (0.28, 1.0, False),
    ):  # fmt: skip
        update(schedule, moved=moved, gain=gain)
        assert schedule.searched is searched
    calm = Schedule(most_searches=8, most_settled=1)
    update(calm, moved=None)
    update(calm, moved=0.01, gain=1.3)
    assert calm.searched is False


def test_what_changes_nothing_is_the_end() -> None:
    schedule = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, radius=30.0, number=3)
    update(schedule, reach=28.0)
    assert schedule.ended


@pytest.mark.parametrize(
    "found", [{"restless": 0.5}, {"gain": 1.05}, {"reach": 35.0}, {"creep": 0.01}, {"weighted": True}]
)
def test_what_still_changes_is_not_the_end(found: dict[str, float]) -> None:
    schedule = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, radius=30.0, number=3)
    update(schedule, **({"reach": 28.0} | found))
    assert (schedule.searched, schedule.ended) == (False, False)


def test_crowded_views_count_less_until_the_creep_ends() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    update(schedule, moved=None)
    assert schedule.balanced  # a search tells nothing of a creep
    schedule.searched = False
    update(schedule, creep=0.01)
    assert schedule.balanced
    update(schedule)
    assert not schedule.balanced
    update(schedule, creep=0.01)
    assert not schedule.balanced  # and not again: all views together give the better map
    resting = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, radius=20.0, number=3)
    update(resting, creep=0.003, restless=0.01)
    assert resting.balanced  # with all views alike, poses at rest may still creep
    update(resting, creep=0.003, restless=0.01, weighted=True, reach=28.0)
    assert not resting.balanced
    assert resting.radius == 30
    update(resting, creep=0.003, reach=28.0)
    assert resting.ended


def test_radius_waits_while_poses_and_map_creep() -> None:
    schedule = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, radius=20.0, number=3)
    update(schedule, reach=60.0, creep=0.01)
    assert schedule.radius == 20
    update(schedule, reach=60.0, creep=0.0)
    assert schedule.radius > 30
    even = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, radius=20.0, number=3)
    update(even, reach=60.0, creep=0.01, even=True, restless=0.2)
    assert even.radius == 20
    update(even, reach=60.0, creep=0.01, even=True, restless=0.01)
    assert even.radius > 30  # a strain of poses at rest, where no view is crowded, is noise


def test_those_that_fit_nowhere_are_sought_as_long_as_some_are_found() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    update(schedule, moved=None)  # nobody was seen before
    assert plan(schedule).lost_searched
    update(schedule, moved=0.1, gain=1.3, found_again=0.3)
    assert plan(schedule).lost_searched
    update(schedule, moved=0.1, gain=1.3, found_again=0.01)
    assert not plan(schedule).lost_searched
    centred = schedule.plan(LEVELS, shifted=False, extent=0.75)
    assert not centred.lost_searched
    imported = Schedule(most_searches=0, most_settled=1)
    assert not plan(imported).lost_searched


def test_poses_that_nothing_is_sure_of_are_sought_once_more_after_the_search() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    update(schedule, moved=None, found_again=0.0)
    assert plan(schedule).doubted == 0  # all are searched
    schedule.searched = False
    assert (plan(schedule).doubted, plan(schedule).lost_searched) == (0.9, True)
    update(schedule)
    assert (plan(schedule).doubted, plan(schedule).lost_searched) == (0, False)
    imported = Schedule(most_searches=0, most_settled=1)
    assert plan(imported).doubted == 0
    # Where views are crowded, by maps that creep no more; the run does not end before.
    crowded = Schedule(most_searches=8, most_settled=1, searched=False, searches=2, crowded=True, radius=30.0)
    assert plan(crowded).doubted == 0
    update(crowded, creep=0.01, weighted=True, reach=28.0)
    assert plan(crowded).doubted == 0
    last = crowded.plan(LEVELS, shifted=True, extent=0.75, closing=True)
    assert last.doubted == 0.9  # no more iterations to wait for
    update(crowded, reach=28.0)
    assert (plan(crowded).doubted, crowded.ended) == (0.9, False)
    update(crowded, reach=28.0)
    assert crowded.ended


def test_thin_evidence_is_searched_for_more_modes() -> None:
    schedule = Schedule(most_searches=8, most_settled=1)
    update(schedule, reach=28.0, moved=None, evidence=20.0)
    found = plan(schedule)
    assert (found.thin, found.modes_of(found.thin)) == (True, 20)
    assert found.search_radius_of(True) == 16  # a third farther than usual
    update(schedule, reach=28.0, moved=0.5, evidence=90.0)
    found = plan(schedule)
    assert (found.thin, found.modes_of(False), found.search_radius_of(False)) == (False, 3, 12)
    assert found.modes_of(True) == 20  # of a single image that says little
    schedule.searched = False
    update(schedule, evidence=20.0)
    assert not plan(schedule).thin  # new particles are sought as ever once the others are not any more


def test_imported_poses_are_never_searched() -> None:
    schedule = Schedule(most_searches=0, most_settled=1)
    assert schedule.searched is False
    update(schedule, reach=12.0)
    assert schedule.ended


def test_a_small_particle_is_searched_at_a_higher_radius() -> None:
    radius = [
        plan_iteration(40.0, LEVELS, 0, searched=True, shifted=True, extent=extent).search_radius
        for extent in (0.9, 0.5, 0.2)
    ]
    assert radius == [12, 18, 24]


def test_state_is_taken_up() -> None:
    schedule, again = (Schedule(most_searches=8, most_settled=1) for _ in range(2))
    update(schedule, moved=None)
    update(schedule, moved=0.4, gain=1.1)
    again.load_state_dict(schedule.state_dict())
    assert again == schedule


def test_poses_that_are_being_told_apart_keep_it_going() -> None:
    schedule = Schedule(most_searches=0, most_settled=1, radius=28.0)
    update(schedule, reach=26.0, exchanging=True)
    assert not schedule.ended
    update(schedule, reach=26.0, exchanging=False)
    assert schedule.ended
