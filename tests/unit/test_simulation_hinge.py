"""Hinges: turns against closed forms and scipy, conformers against rigid bodies."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scalecryo.data.formats.structure import Atoms
from scalecryo.data.simulation.hinge import Hinge
from scalecryo.data.simulation.imperfections import draw_conditions
from scalecryo.data.simulation.settings import Imperfections
from scalecryo.errors import InputError


def atoms() -> Atoms:
    positions = np.random.default_rng(1).normal(size=(60, 3)) * 6
    positions[40:] += [60.0, 0, 0]
    positions[40] = [27.0, 0, 0]  # the only one of B within 8 Å of A
    positions[0] = [22.0, 0, 0]
    return Atoms(positions, ("C",) * 60, np.zeros(60), ("A",) * 40 + ("B",) * 20)


def test_a_full_circle_in_steps_and_an_arc() -> None:
    circle = Hinge.parse("B:0,0,2:360:4").turns(0)
    expected = Rotation.from_euler("z", [[0], [90], [180], [270]], degrees=True).as_matrix()
    np.testing.assert_allclose(circle, expected, atol=1e-12)  # double precision
    arc = Hinge.parse("B:x:60:3").turns(0)
    np.testing.assert_allclose(arc, Rotation.from_euler("x", [[-30], [0], [30]], degrees=True).as_matrix(), atol=1e-12)


def test_random_turns_stay_within_their_angle_and_follow_the_seed() -> None:
    hinge = Hinge.parse("A:random:40:50")
    turns = np.array(hinge.turns(3))
    angles = np.rad2deg(Rotation.from_matrix(turns).magnitude())
    assert angles.max() <= 40
    assert angles.max() > 30
    np.testing.assert_array_equal(turns, hinge.turns(3))
    assert not np.allclose(turns, hinge.turns(4))


def test_one_body_turns_about_the_contact_and_the_other_stays() -> None:
    whole = atoms()
    found = Hinge.parse("B:0,1,1:360:8").conformers(whole, "structure", 0)
    pivot = whole.positions[40]
    for number, conformer in enumerate(found):
        np.testing.assert_array_equal(conformer.positions[:40], whole.positions[:40])
        turn = Rotation.from_rotvec(np.deg2rad(45 * number) * np.array([0, 1, 1]) / np.sqrt(2))
        moved = turn.apply(whole.positions[40:] - pivot) + pivot
        np.testing.assert_allclose(conformer.positions[40:], moved, atol=1e-9)


@pytest.mark.parametrize(
    "text", ["B:z:60", "B:q:60:4", ":z:60:4", "B:z:0:4", "B:z:400:4", "B:z:60:0", "B:0,0,0:60:4", "B:z:60:5000"]
)
def test_what_is_no_hinge_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="CHAINS:AXIS:DEGREES:STEPS"):
        Hinge.parse(text)


def test_a_chain_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match="its chains are A, B"):
        Hinge.parse("C:z:60:4").conformers(atoms(), "structure", 0)
    with pytest.raises(InputError, match="turn some of them"):
        Hinge.parse("A,B:z:60:4").conformers(atoms(), "structure", 0)


def test_classes_follow_their_shares() -> None:
    found = draw_conditions(20_000, Imperfections(), 3, 7, (6, 3, 1)).class_index
    # A binomial's standard deviation is below 0.0035 here: four of them.
    np.testing.assert_allclose(np.bincount(found, minlength=3) / 20_000, [0.6, 0.3, 0.1], atol=0.014)
    with pytest.raises(InputError, match="2 shares of 3 structures"):
        draw_conditions(10, Imperfections(), 3, 7, (1, 1))
