"""Sums that several workers inserted into: each map's are added on one worker, which solves it for all."""

from collections.abc import Set

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.map.backprojection import REGULARISATION, TOGETHER, Backprojection
from scalecryo.map.class_differences import alike_shares
from scalecryo.map.component_frame import ridge_of
from scalecryo.map.components import ComponentSums
from scalecryo.map.pseudo_symmetry import drawn_to_symmetry, symmetry_centre
from scalecryo.pose.related import RelatedPoses

# Share of a shell's mean weight that a class's difference lacks. Three compositions of a complex, views crowded, the
# labels of a third of one wrong: 99.4, 99.3 % right with 0.2, 1 after seven passes, 95.8 % after four with 0.05.
SHRINKAGE = 0.2


class OwnedSums:
    """Who owns which map's sums: half the bytes of an all-reduce, and every worker solves its share.

    Attributes:
        sums: of this worker; once they are reduced, what it does not own is lost.
    """

    def __init__(self, sums: Backprojection, world: World, *, parts: int = 1, joined: bool = False) -> None:
        """
        Args:
            sums: of this worker.
            world: all workers.
            parts: number of neighbouring classes of the sums that are parts of one map.
            joined: whether something is made of both halves of a map together, so that one worker needs both.
        """
        self.sums, self._world, self._parts, self._joined = sums, world, parts, joined

    def owner(self, number: int, half: int = 1) -> int:
        """The worker that owns a half, 1 or 2, of a map."""
        return (number if self._joined else 2 * number + half - 1) % self._world.size

    def reduce_(self, radius: float) -> None:
        """Add what the workers inserted, up to a radius (Fourier pixels), each map's on its owner. Collective."""
        if self._world.size == 1:
            return
        where = self.sums.reached(radius)
        for owner, maps in self._by_owner().items():
            classes = [(part, half) for number, half in maps for part in self._classes(number)]
            grids = [grid[place, half - 1].view(-1) for place, half in classes for grid in self.sums.tensors()]
            # Small ones travel together: a reduction costs a round trip.
            together = len(grids) if self.sums.padded_box <= TOGETHER else 1
            for first in range(0, len(grids), together):
                _reduce_(grids[first : first + together], where, self._world, owner)

    def symmetrise(self, rotations: Float[Tensor, "e 3 3"], radius: float) -> None:
        """`Backprojection.symmetrise` of the sums that this worker owns."""
        which = [2 * part + half - 1 for number, half in self._mine() for part in self._classes(number)]
        self.sums.symmetrise(rotations, radius, sorted(which))

    def solve(
        self, regularisation: float = REGULARISATION, *, without: int | None = None
    ) -> Float[Tensor, "maps 2 n n n"]:
        """Both halves of every map, each solved by its owner, on every worker. Collective.

        Args:
            regularisation: as in `Backprojection.solve_one`.
            without: part that is left out.
        """
        found = self._empty(self.sums.classes // self._parts, 2)
        for number, half in self._mine():
            # Merged one at a time, and only by those who own it: a copy of all would take as much as a pass's sums.
            whole = self.sums if self._parts == 1 else self.sums.merged(self._classes(number, without), half)
            place = (number, half) if self._parts == 1 else (0, 1)
            found[number, half - 1] = whole.solve_one(*place, regularisation)
        return self._to_all(found)

    def solve_tied(
        self,
        shares: Float[Tensor, "groups classes"],
        regularisation: float = REGULARISATION,
        *,
        without: int | None = None,
    ) -> tuple[Float[Tensor, "maps 2 n n n"], Float[Tensor, "groups classes"]]:
        """As `solve`, of the classes of one assembly: each half's common map, and what the images of a class say beyond
        it. Where a class has few views it is the common map, and not empty. Collective.

        Its images' differences from the common map are solved by themselves; `SHRINKAGE` is what a difference lacks in
        a voxel with a shell's mean weight. A class unlike the others is solved as by `solve`, and is no part of theirs.

        Args:
            shares: of the particles, in each class of each group of maps that have a common one; 0: an empty class.
            regularisation, without: as in `solve`.

        Returns:
            The maps, and the shares with 0 for those that are unlike the others of their group.
        """
        maps = self._solve_tied(shares, regularisation, without)
        groups = zip(maps.unflatten(0, tuple(shares.shape)), shares, strict=True)
        kept = torch.stack([tied_shares(of_group, own, self._world) for of_group, own in groups])
        if not torch.equal(kept, shares):
            maps = self._solve_tied(kept, regularisation, without)
        return maps, kept

    def _solve_tied(
        self, shares: Float[Tensor, "groups classes"], regularisation: float, without: int | None
    ) -> Float[Tensor, "maps 2 n n n"]:
        """Maps of those with a share are tied, others are not. Collective."""
        found, mine = self._empty(self.sums.classes // self._parts, 2), self._mine()
        for group, own in enumerate((shares > 0).tolist()):
            first = group * len(own)
            tied = {first + number for number, is_tied in enumerate(own) if is_tied}
            common = self._sum_of(tied, without)
            for half in (1, 2):
                numbers = [number for number, of in mine if of == half and first <= number < first + len(own)]
                if not numbers:
                    continue
                base, transform = common.solve_one(0, half, regularisation), common.transform(half, regularisation)
                for number in numbers:
                    whole = self.sums.merged(self._classes(number, without), half)
                    if number in tied:
                        whole.less_(transform)
                        found[number, half - 1] = base + whole.solve_one(0, 1, SHRINKAGE)
                    else:
                        found[number, half - 1] = whole.solve_one(0, 1, regularisation)
        return self._to_all(found)

    def _sum_of(self, numbers: Set[int], without: int | None) -> Backprojection:
        """The sums of some maps together, half by half, on every worker. Collective."""
        found = self.sums.merged([0])  # as symmetric as they are
        for grid, total in zip(self.sums.tensors(), found.tensors(), strict=True):
            total.zero_()
            for number, half in self._mine():
                for part in self._classes(number, without) if number in numbers else ():
                    total[0, half - 1] += grid[part, half - 1]
        self._world.all_reduce_(*found.tensors())
        return found

    def drawn_to_symmetry(
        self, maps: Float[Tensor, "2 n n n"], related: RelatedPoses, radius: float, mask: Float[Tensor, "n n n"]
    ) -> tuple[Float[Tensor, "2 n n n"], Float[Tensor, ""]]:
        """Half-maps of the only map for telling related poses apart, and how asymmetric it is (`pseudo_symmetry`).
        Collective.

        Args:
            maps: as `solve` gave them.
            related: poses that show almost the same.
            radius: Fourier pixels up to which images were inserted.
            mask: around the map's density.
        """
        copies = self._empty(2)
        weight = maps.new_zeros(2, *maps.shape[1:3], self.sums.box_size // 2 + 1)
        centre, whole_turn = symmetry_centre(related.rotation, related.offset), torch.eye(3).to(mask)
        for _, half in self._mine():
            whole = self.sums.merged(self._classes(0), half)
            weight[half - 1] = whole.weight()
            whole.moved(centre)
            whole.symmetrise(related.rotation[1:], radius)
            copies[half - 1] = linear_map(whole.solve_one(), whole_turn, centre * self.sums.box_size)
        self._to_all(copies[None])
        self._to_all(weight[None])
        drawn, share = drawn_to_symmetry(maps * mask, copies * mask, weight)
        self._world.broadcast_(0, share)  # others might round otherwise, and it decides when the run ends
        return drawn, share

    def solve_joined(
        self, regularisation: float = REGULARISATION, *, without: int | None = None
    ) -> Float[Tensor, "maps n n n"]:
        """Every map from both halves together; arguments as in `solve`. Collective."""
        assert self._joined, "one worker needs both halves"
        found = self._empty(self.sums.classes // self._parts, 1)
        for number, _ in self._mine()[::2]:
            both = self.sums.merged(self._classes(number, without)).joined()
            found[number, 0] = both.solve_one(0, 1, regularisation)
        return self._to_all(found)[:, 0]

    def _to_all(self, maps: Float[Tensor, "maps halves z y x"]) -> Float[Tensor, "maps halves z y x"]:
        """What owners made of maps, in place on every worker; of each both halves, or one of both. Collective."""
        for owner, owned in self._by_owner().items():
            self._world.broadcast_(owner, *(maps[number, half - 1] for number, half in owned if half <= maps.shape[1]))
        return maps

    def _mine(self) -> list[tuple[int, int]]:
        """Maps and halves of this worker, in order."""
        return self._by_owner().get(self._world.rank, [])

    def _by_owner(self) -> dict[int, list[tuple[int, int]]]:
        """Maps and halves of each worker that owns any, in order."""
        found: dict[int, list[tuple[int, int]]] = {}
        for number in range(self.sums.classes // self._parts):
            for half in (1, 2):
                found.setdefault(self.owner(number, half), []).append((number, half))
        return found

    def _classes(self, number: int, without: int | None = None) -> list[int]:
        return [self._parts * number + part for part in range(self._parts) if part != without]

    def _empty(self, *count: int) -> Tensor:
        device = self.sums.denominator.device
        return torch.empty((*count, *[self.sums.box_size] * 3), dtype=torch.float32, device=device)


def tied_shares(
    maps: Float[Tensor, "classes 2 n n n"], shares: Float[Tensor, " classes"], world: World
) -> Float[Tensor, " classes"]:
    """`alike_shares` by worker 0, to all: others might round otherwise, and it decides what is tied. Collective."""
    kept = alike_shares(maps, shares)
    world.broadcast_(0, kept)
    return kept


def solve_components(
    sums: ComponentSums, world: World, radius: float, curves: Float[Tensor, "q shells"] | None
) -> Float[Tensor, "2 q n n n"]:
    """Components of both halves on every worker; each half's sums are added on one, which solves it. Collective.

    Args:
        sums: of this worker; what it does not own is lost.
        world: all workers.
        radius: Fourier pixels up to which images were inserted.
        curves: correlation of the halves' components by shell; None: see `ridge_of`.
    """
    shape = (2, sums.components, *[sums.box_size] * 3)
    found = torch.empty(shape, dtype=torch.float32, device=sums.grid.device)
    if world.size > 1:
        where = sums.reached(radius)
        for half in (1, 2):
            _reduce_([sums.grid[half - 1].flatten(0, 2)], where, world, (half - 1) % world.size)
    for half in (1, 2):
        if (half - 1) % world.size == world.rank:
            ridge = ridge_of(curves, sums.mean_weight(half, radius))
            found[half - 1] = sums.solve(half, ridge, radius)
    for half in (1, 2):
        world.broadcast_((half - 1) % world.size, found[half - 1])
    return found


def _reduce_(grids: list[Tensor], where: Int[Tensor, " k"], world: World, owner: int) -> None:
    """Add some rows of grids over all workers, on their owner alone."""
    parts = [grid.index_select(0, where) for grid in grids]
    world.reduce_(owner, *parts)
    if owner == world.rank:
        for grid, part in zip(grids, parts, strict=True):
            grid.index_copy_(0, where, part)
