"""Each map's sums come together on one worker, which solves it for all."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.component_frame import ridge_of
from scalecryo.map.components import ComponentSums
from scalecryo.map.reference import reference_transform
from scalecryo.physics.fft import fourier_pixels, fourier_resize_3d
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.rotation import euler_to_rotation, random_rotations
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.related import RelatedPoses
from scalecryo.pose.search import templates
from scalecryo.train.owned_sums import OwnedSums, solve_components
from tests.support.blobs import blobs
from tests.support.thread_world import ThreadWorld

BOX, RADIUS, PARTS = 12, 4.0, 2


def _sums(rank: int, classes: int) -> Backprojection:
    """Random sums up to the radius, and zero beyond it as after insertion."""
    sums, generator = Backprojection(BOX, classes=classes), torch.Generator().manual_seed(rank)
    kept = torch.zeros(sums.denominator[0, 0].numel())
    kept[sums.reached(RADIUS)] = 1.0
    kept = kept.view_as(sums.denominator[0, 0])
    sums.numerator += torch.randn(sums.numerator.shape, dtype=torch.complex64, generator=generator) * kept
    sums.denominator += torch.rand(sums.denominator.shape, generator=generator) * kept
    return sums


def _whole(parts: Backprojection, chosen: list[int]) -> Backprojection:
    """Parts of every map added."""
    made = Backprojection(BOX, classes=parts.classes // PARTS)
    for own, grid in zip(made.tensors(), parts.tensors(), strict=True):
        own += grid.unflatten(0, (-1, PARTS))[:, chosen].sum(1)
    made._copies = parts._copies
    return made


def _by_all(size: int, work: Callable[[World], list[Tensor]]) -> list[list[Tensor]]:
    """What each worker finds."""
    worlds: list[World] = [World()] if size == 1 else list(ThreadWorld.of(size))
    found = dict[int, list[Tensor]]()
    threads = [threading.Thread(target=lambda own=own: found.update({own.rank: work(own)})) for own in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "classes"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_maps_of_all_workers_sums(size: int, classes: int, symmetric: bool, joined: bool) -> None:
    """Reference: all sums added and solved in one place. Two parts a class, as an iteration that searches has.

    What a worker does not own is not a number (`ThreadWorld`).
    """
    others = PointGroup.of("C2").others
    whole = _sums(0, classes * PARTS)
    for rank in range(1, size):
        for total, more in zip(whole.tensors(), _sums(rank, classes * PARTS).tensors(), strict=True):
            total += more
    if symmetric:
        whole.symmetrise(others, RADIUS)
    expected = [_whole(whole, [0, 1]).solve(), _whole(whole, [1]).solve()]
    if joined:
        expected += [_whole(whole, [0, 1]).joined().solve()[:, 0], _whole(whole, [1]).joined().solve()[:, 0]]

    def work(world: World) -> list[Tensor]:
        owned = OwnedSums(_sums(world.rank, classes * PARTS), world, parts=PARTS, joined=joined)
        owned.reduce_(RADIUS)
        if symmetric:
            owned.symmetrise(others, RADIUS)
        both = [owned.solve_joined(), owned.solve_joined(without=0)] if joined else []
        return [owned.solve(), owned.solve(without=0), *both]

    for found in _by_all(size, work):
        for maps, reference in zip(found, expected, strict=True):
            # Single precision; three addends may be added in another order.
            torch.testing.assert_close(maps, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_tied_maps_of_all_workers_sums(size: int, symmetric: bool) -> None:
    """Reference: one worker with all sums; sums stay as they are."""
    others, classes = PointGroup.of("C2").others, 3
    whole = _sums(0, classes * PARTS)
    for rank in range(1, size):
        for total, more in zip(whole.tensors(), _sums(rank, classes * PARTS).tensors(), strict=True):
            total += more
    alone = OwnedSums(whole, World(), parts=PARTS)
    if symmetric:
        alone.symmetrise(others, RADIUS)
    before = whole.numerator.clone()
    shares = torch.tensor([[0.5, 0.3, 0.2]])  # noise: whether classes are unlike is chance
    expected = [*alone.solve_tied(shares), alone.solve_tied(shares, without=1)[0]]
    assert torch.equal(whole.numerator, before)

    def work(world: World) -> list[Tensor]:
        owned = OwnedSums(_sums(world.rank, classes * PARTS), world, parts=PARTS)
        owned.reduce_(RADIUS)
        if symmetric:
            owned.symmetrise(others, RADIUS)
        return [*owned.solve_tied(shares), owned.solve_tied(shares, without=1)[0]]

    for found in _by_all(size, work):
        for maps, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(maps, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_one_class_tied_is_that_class() -> None:
    # But for what the regularisation, a thousandth of the mean weight, takes from it: that the difference gives back.
    sums = _sums(0, 1)
    sums.denominator += (sums.denominator > 0).float()
    owned = OwnedSums(sums, World())
    plain = owned.solve()
    torch.testing.assert_close(
        owned.solve_tied(torch.ones(1, 1))[0], plain, rtol=0, atol=2e-3 * float(plain.abs().max())
    )


def test_a_class_without_side_views_gets_them_from_all() -> None:
    # Reference: the maps that slices without noise were taken of. The second class lacks a ball, and is seen along z
    # alone: by itself it is next to nothing along x and y, tied it is nearer to its own map than the common one is.
    box, pixels = 24, fourier_pixels(24, 10.0)
    whole = blobs(box, 1)
    line = torch.arange(box) - box // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    part = whole * (1 - torch.exp(-((x - 3) ** 2 + (y + 3) ** 2 + z**2) / (2 * 2.5**2)))
    sums, generator = Backprojection(box, classes=2), torch.Generator().manual_seed(0)
    anywhere = random_rotations(400, generator)
    along_z = euler_to_rotation(torch.rand(400, 3, generator=generator) * torch.tensor([360.0, 30.0, 360.0]))
    for number, (volume, rotation) in enumerate([(whole, anywhere), (part, along_z)]):
        slices = templates(reference_transform(volume, 2.0), rotation, pixels, 2.0)
        ones, half = torch.ones(400), 1 + torch.arange(400) % 2
        sums.add(ctf_weighted(slices, None), rotation, torch.zeros(400, 2), ones, half, pixels, half * 0 + number)
    owned = OwnedSums(sums, World())
    maps, shares = owned.solve_tied(torch.tensor([[0.5, 0.5]]))
    assert bool((shares > 0).all())
    tied, plain = maps[1], owned.solve()[1]
    common = sums.merged([0, 1]).solve()[0]
    low = fourier_resize_3d(fourier_resize_3d(part, 20), box)  # as far as slices reach

    def off(maps: Tensor) -> float:
        return float(sum(1 - fsc(half, low)[1:9].mean() for half in maps))

    assert off(tied) < 0.5 * off(plain)
    assert off(tied) < 0.9 * off(common)  # what differs is seen between the views alone


def test_a_class_unlike_the_others_stands_by_itself() -> None:
    # Two compositions of one map, and another map: reference, the plain maps of the third, and the two alone.
    box, pixels = 24, fourier_pixels(24, 10.0)
    sums, pair, generator = (
        Backprojection(box, classes=3),
        Backprojection(box, classes=2),
        torch.Generator().manual_seed(0),
    )
    for number, volume in enumerate([blobs(box, 1), blobs(box, 1) * 0.9, blobs(box, 3)]):
        rotation = random_rotations(400, generator)
        slices = templates(reference_transform(volume, 2.0), rotation, pixels, 2.0)
        half = 1 + torch.arange(400) % 2
        inserted = ctf_weighted(slices, None), rotation, torch.zeros(400, 2), torch.ones(400), half, pixels
        sums.add(*inserted, half * 0 + number)
        if number < 2:
            pair.add(*inserted, half * 0 + number)
    shares = torch.tensor([[0.4, 0.4, 0.2]])
    maps, kept = OwnedSums(sums, World()).solve_tied(shares)
    torch.testing.assert_close(kept, torch.tensor([[0.4, 0.4, 0.0]]))
    assert torch.equal(maps[2], OwnedSums(sums, World()).solve()[2])
    alone, _ = OwnedSums(pair, World()).solve_tied(torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(maps[:2], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("size", [2, 3])
def test_maps_drawn_to_a_symmetry_of_all_workers_sums(size: int) -> None:
    """Reference: one worker with all sums; sums stay as they are."""
    whole, group = _sums(0, PARTS), PointGroup.of("C2")
    for rank in range(1, size):
        for total, more in zip(whole.tensors(), _sums(rank, PARTS).tensors(), strict=True):
            total += more
    related = RelatedPoses(group.rotations, torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    mask, before = torch.ones(BOX, BOX, BOX), whole.numerator.clone()
    alone = OwnedSums(whole, World(), parts=PARTS)
    expected, asymmetry = alone.drawn_to_symmetry(alone.solve()[0], related, RADIUS, mask)
    assert torch.equal(whole.numerator, before)

    def work(world: World) -> list[Tensor]:
        owned = OwnedSums(_sums(world.rank, PARTS), world, parts=PARTS)
        owned.reduce_(RADIUS)
        return list(owned.drawn_to_symmetry(owned.solve()[0], related, RADIUS, mask))

    for found, share in _by_all(size, work):
        assert float(share) == pytest.approx(float(asymmetry), rel=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_components_of_all_workers_sums(size: int) -> None:
    """Reference: all sums added and solved in one place; what a worker does not own is not a number."""

    def sums(rank: int) -> ComponentSums:
        made, rng = ComponentSums(BOX, 2), torch.Generator().manual_seed(rank)
        flat = made.grid.flatten(1, 3)
        where = made.reached(RADIUS)
        values = torch.randn(2, len(where), made.channels, generator=rng)
        values[..., [4, 6]] = values[..., [4, 6]].abs() + 1  # M is positive
        values[..., 5] *= 0.1
        flat[:, where] = values
        return made

    whole = sums(0)
    for rank in range(1, size):
        whole.grid += sums(rank).grid
    curves = torch.linspace(0.9, 0.2, BOX // 2 + 1).expand(2, -1)
    expected = torch.stack([
        whole.solve(half, ridge_of(curves, whole.mean_weight(half, RADIUS)), RADIUS) for half in (1, 2)
    ])  # fmt: skip
    for (found,) in _by_all(size, lambda world: [solve_components(sums(world.rank), world, RADIUS, curves)]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
