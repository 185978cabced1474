"""When the start ends: gains and agreements as they were measured."""

import pytest

from scalecryo.train.stages.bootstrap import settled


@pytest.mark.parametrize(
    ("gains", "agreement", "ends"),
    [
        ([97.4], 0.87, False),  # a first round is never the last
        ([56.1, 61.4], 0.95, False),
        ([56.1, 61.4, 62.1], 0.98, True),  # CMG helicase
        ([97.4, 100.8, 102.4], 0.83, False),  # β-galactosidase, sheared by 9°
        ([97.4, 100.8, 102.4, 105.2, 106.2], 0.86, True),  # much less so
        ([2.9, 3.0, 3.2, 3.2], 0.70, False),
        ([3.2, 3.19, 3.2, 3.2, 3.2, 3.2, 3.2], 0.60, True),  # nothing has moved for long
    ],
)
def test_the_start_ends_where_another_round_would_bring_nothing(
    gains: list[float], agreement: float, ends: bool
) -> None:
    assert settled(gains, agreement) == ends
