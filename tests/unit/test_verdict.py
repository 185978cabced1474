"""A run in words: what makes it good, limited by its pixels, or doubtful."""

from dataclasses import replace

import pytest

from scalecryo.evaluate.verdict import HAND, Evidence, judge

GOOD = Evidence(angstrom=4.0, pixel_size=1.0, diameter=100.0, confidence=0.9, junk=0.1, independent=True)


def test_a_map_far_from_nyquist_is_good() -> None:
    verdict = judge(GOOD, {"particles": "10"})
    assert verdict.grade == "good"
    assert "4.00 Å" in verdict.headline
    assert HAND in verdict.text
    assert verdict.figures == {"particles": "10"}


def test_a_map_at_nyquist_is_limited_by_its_pixels() -> None:
    verdict = judge(replace(GOOD, angstrom=2.1), {})
    assert verdict.grade == "limited"
    assert "2.00 Å" in verdict.headline


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"angstrom": 20.0}, "5.0 resolution elements"),
        ({"confidence": 0.3}, "probability of 30%"),
        ({"junk": 0.7}, "70% of the images"),
        ({"independent": False}, "optimistic"),
        ({"coherent": 0.15}, "many poses are likely to be wrong"),
        ({"coherent": 0.15, "coverage": 0.2}, "how uneven the found views are"),
        ({"uneven": "only to 24 Å in one direction"}, "only to 24 Å in one direction. Where the views"),
    ],
)
def test_doubts_are_named(change: dict, reason: str) -> None:
    verdict = judge(replace(GOOD, **change, warnings=("one direction is poor",)), {})
    assert verdict.grade == "doubtful"
    assert any(reason in said for said in verdict.reasons)
    assert "One direction is poor" in verdict.reasons


def test_a_warning_alone_is_told_and_makes_no_doubt() -> None:
    verdict = judge(replace(GOOD, warnings=("one direction is poor",)), {})
    assert verdict.grade == "good"
    assert verdict.reasons == ("one direction is poor",)
    assert "no check found anything" not in verdict.text


def test_what_was_noticed_on_the_way_is_not_denied() -> None:
    assert "no check found anything" in judge(GOOD, {}).text
    verdict = judge(replace(GOOD, noticed=True), {})
    assert verdict.grade == "good"
    assert "read what was noticed" in verdict.text


@pytest.mark.parametrize("coherent", [None, 0.3, 1.0, 8.0])
def test_half_maps_that_hold_the_images_signal_are_no_doubt(coherent: float | None) -> None:
    assert judge(replace(GOOD, coherent=coherent), {}).grade == "good"


def test_images_that_do_not_fit_are_told_and_what_would_show_them() -> None:
    """A map of some conformations looks as good as one of all: 45 % of a set whose chain turned at random were left."""
    verdict = judge(replace(GOOD, junk=0.45), {})
    assert verdict.grade == "good"
    (told,) = verdict.reasons
    assert told.startswith("45% of the images do not fit the map")
    assert "--classes 4" in told
    assert "no check found anything" not in verdict.text
    (told,) = judge(replace(GOOD, junk=0.45, angstrom=2.1, classes=6), {}).reasons
    assert "any of the maps" in told
    assert "more classes" in told
    assert judge(replace(GOOD, junk=0.12), {}).reasons == ()
    doubtful = judge(replace(GOOD, junk=0.45, confidence=0.3), {})
    assert doubtful.grade == "doubtful"
    assert any("do not fit the map" in said for said in doubtful.reasons)
