"""Maps of the classes of one assembly, tied together, against the maps that the noise was added to."""

import torch
from torch import Tensor

from scalecryo.map.class_differences import alike_shares, tied_classes
from scalecryo.physics.fsc import fsc, weight_shells
from scalecryo.physics.mask import soft_sphere
from tests.support.blobs import blobs

BOX = 32
MASK = soft_sphere(BOX, 12, edge_px=3)
EVEN = torch.tensor([0.5, 0.5])


def compositions() -> Tensor:
    """A map, and the same without what lies in a ball of 4 px off its centre."""
    whole = blobs(BOX, 1) * MASK
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack([whole, whole * (1 - torch.exp(-((x - 3) ** 2 + (y + 3) ** 2 + z**2) / (2 * 2.5**2)))])


def half_maps(truth: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Both halves of each class, in noise."""
    noise = torch.randn(2, 2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(4))
    return truth[:, None] + noise * torch.tensor(sigma)[:, None, None, None, None]


def alone(maps: Tensor) -> Tensor:
    """Each class filtered by its own halves' correlation."""
    found = []
    for halves in maps:
        curve = fsc(*(half * MASK for half in halves)).float().clamp(0, 1)
        found.append(torch.stack([weight_shells(half, curve) for half in halves]))
    return torch.stack(found)


def error(maps: Tensor, truth: Tensor) -> float:
    return float(((maps - truth) * MASK).square().sum())


def test_a_difference_is_nearer_the_true_one() -> None:
    # Reference: the maps without noise. The ball holds 1 % of the box: what is left of the noise elsewhere, of two
    # classes by themselves, is most of their difference's error.
    truth = compositions()
    maps = half_maps(truth, (0.15, 0.15))
    tied, single = tied_classes(maps, EVEN, MASK), alone(maps)
    true = truth[0] - truth[1]
    for half in (0, 1):
        own = error(tied[0, half] - tied[1, half], true)
        assert own < 0.5 * error(single[0, half] - single[1, half], true)
        assert own < 0.5 * float(true.square().sum())  # it is seen, too


def test_a_class_that_says_little_is_the_common_map() -> None:
    # The second class has a twentieth of the particles: alone its noise hides most of it.
    truth = compositions()
    maps, shares = half_maps(truth, (0.3, 1.3)), torch.tensor([0.95, 0.05])
    tied, single = tied_classes(maps, shares, MASK), alone(maps)
    assert error(tied[1], truth[1]) < 0.5 * error(single[1], truth[1])
    assert error(tied[0], truth[0]) < 1.1 * error(single[0], truth[0])


def test_what_is_alike_stays_alike() -> None:
    # Of one structure the halves share no difference but by chance.
    whole = compositions()[:1].expand(2, -1, -1, -1)
    tied = tied_classes(half_maps(whole, (0.3, 0.3)), EVEN, MASK)
    assert error(tied[0], tied[1]) < 0.01 * error(tied[0], torch.zeros(()))


def test_both_halves_together_are_nearer_than_either() -> None:
    # Wiener filters leave S N / (S + N) of signal S in noise N: with half of the noise 0.5 to 1 times as much.
    truth = compositions()
    maps = half_maps(truth, (0.15, 0.15))
    joined = tied_classes(maps, EVEN, MASK, joined=True)
    assert joined.shape == (2, 1, BOX, BOX, BOX)
    assert error(joined[:, 0], truth) < 0.7 * error(tied_classes(maps, EVEN, MASK)[:, 0], truth)


def test_an_empty_class_is_allowed() -> None:
    maps = half_maps(compositions(), (0.1, 0.1))
    maps[1] = 0
    tied = tied_classes(maps, torch.tensor([1.0, 0.0]), MASK)
    assert bool(tied.isfinite().all())
    assert error(tied[0], compositions()[0]) < 0.1 * float(compositions()[0].square().sum())


def test_a_class_that_stands_by_itself_is_filtered_by_its_own_halves() -> None:
    truth = torch.cat([compositions(), blobs(BOX, 3)[None] * MASK])
    noise = torch.randn(3, 2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(4)) * 0.2
    maps = truth[:, None] + noise
    tied = tied_classes(maps, torch.tensor([0.4, 0.4, 0.0]), MASK)
    torch.testing.assert_close(tied[2], alone(maps)[2])
    torch.testing.assert_close(tied[:2], tied_classes(maps[:2], EVEN, MASK))


def test_compositions_are_alike_and_other_structures_are_not() -> None:
    truth = torch.cat([compositions(), blobs(BOX, 3)[None] * MASK])
    noise = torch.randn(3, 2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(4)) * 0.2
    maps = truth[:, None] + noise
    assert torch.equal(alike_shares(maps[:2], EVEN), EVEN)
    shares = torch.tensor([0.45, 0.45, 0.1])
    assert torch.equal(alike_shares(maps, shares), torch.tensor([0.45, 0.45, 0.0]))
