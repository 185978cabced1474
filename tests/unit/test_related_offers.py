"""Offers of related poses end when neither half takes them, and go on from a checkpoint where they stood."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalecryo.distributed.world import World
from scalecryo.pose.related import RelatedPoses, RelatedRotations
from scalecryo.train.stages.related_offers import RelatedOffers

POSES = RelatedPoses(torch.stack([torch.eye(3), torch.diag(torch.tensor([-1.0, -1.0, 1.0]))]), torch.zeros(2, 3))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often related poses were looked for."""
    seen: list[int] = []

    def of_leader(*args: Any, **kwargs: Any) -> RelatedPoses:
        seen.append(len(seen))
        return POSES

    monkeypatch.setattr(RelatedPoses, "of_leader", of_leader)
    return seen


def offered(offers: RelatedOffers, radius: float) -> RelatedPoses | None:
    volume = torch.ones(1, 4, 4, 4)
    references = SimpleNamespace(mean=lambda: volume[0], mask=volume)
    context = SimpleNamespace(world=World(), fit_shift=True, point_group=None)
    return offers.at(references, radius, context)  # type: ignore[arg-type]


def offers_of(similar: int) -> RelatedOffers:
    made = RelatedOffers()
    made.look_at(RelatedRotations(torch.eye(3).expand(similar, 3, 3), torch.eye(3)[None]), World())
    return made


def test_a_map_that_relates_no_poses_is_not_looked_at_again(looks: list[int]) -> None:
    assert offered(RelatedOffers(), 20.0) is None
    assert offered(offers_of(0), 20.0) is None
    assert not looks


def test_offers_end_when_neither_half_takes_them(looks: list[int]) -> None:
    offers = offers_of(1)
    for share, radius in ((0.2, 20.0), (0.0, 20.0), (0.02, 21.0), (0.0, 30.0)):
        assert offered(offers, radius) is POSES
        offers.note(share)
    assert len(looks) == 2  # again where the radius had grown by half
    offers.note(None)  # an iteration without offers
    assert offered(offers, 30.0) is POSES
    offers.note(0.0)
    assert offered(offers, 60.0) is None


def test_state_is_taken_up(looks: list[int]) -> None:
    offers, again = offers_of(1), RelatedOffers()
    offered(offers, 20.0)
    offers.note(0.0)
    assert again.load_state_dict(offers.state_dict(None), torch.device("cpu")) is None
    found = offered(again, 20.0)
    assert found is not None
    assert torch.equal(found.rotation, POSES.rotation)
    assert len(looks) == 1
    again.note(0.0)
    assert offered(again, 20.0) is None


def test_it_goes_on_while_the_maps_become_more_asymmetric(looks: list[int]) -> None:
    # As measured: GroEL without a chain, which becomes asymmetric in twenty iterations, and 6VXX, which does not.
    for growing, asymmetry in (
        (True, [0.0104, 0.0124, 0.0136, 0.016, 0.018, 0.0195, 0.0221, 0.026]),
        (False, [0.0023, 0.0024, 0.0024, 0.0024]),
        # β-galactosidase, strained by 4 %: it becomes symmetric, as it is.
        (True, [0.188, 0.174, 0.152, 0.150, 0.128, 0.112]),
        (False, [0.188, 0.186, 0.185]),
    ):
        offers = offers_of(1)
        assert not offers.going_on
        seen = []
        for value in asymmetry:
            offered(offers, 20.0)
            offers.asymmetry.append(value)
            offers.note(0.6)
            seen.append(offers.going_on)
        assert seen[0]  # the other half's turn
        assert seen[1:] == [growing] * (len(asymmetry) - 1)
    offers = offers_of(1)
    offers.asymmetry = [0.01, 0.02, 0.04]
    offers.note(0.001)
    offers.note(0.001)
    assert not offers.going_on  # nothing is offered any more
