"""Poses that a map's own symmetry or pseudo-symmetry relates, and which of them nothing tells apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import compare_turned, symmetry_operations
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.rotation import geodesic_angle, nearest_turned
from scalecryo.physics.symmetry import PointGroup, generated_group, symmetry_rotations

# Agreement of a map with itself that makes poses related. Less than that of a map which is called symmetric: one that a
# wrong start has strained by 4 % agrees with itself by 0.76, and gets straight by related poses alone.
SIMILAR = 0.7
ALIKE = 0.97  # of the halves' own correlation: a turned half that agrees as well as this is the same map


@dataclass(frozen=True, eq=False)
class RelatedRotations:
    """Rotations S, without the identity, with V(S x) ≈ V(x): the pose S R shows almost what R shows.

    Attributes:
        similar: all that are found.
        equivalent: those under which the halves agree with each other as they do without: nothing tells S R from R.
        agreement: of the halves under the equivalent rotation that they agree with least, as a share of their own.
        moves: how the map lies on itself by those that are similar, about their own axes.
    """

    similar: Float[Tensor, "s 3 3"]
    equivalent: Float[Tensor, "e 3 3"]
    agreement: float = 1.0
    moves: tuple[Alignment, ...] = ()

    @classmethod
    def of_classes(cls, references: ReferenceSet, group: PointGroup | None = None) -> "list[RelatedRotations]":
        """Of every class's map; none of a class that holds nothing."""
        none = torch.zeros(0, 3, 3, device=references.maps.device)
        held = [references.classes == 1 or bool(references.mean(n).amax() > 0) for n in range(references.classes)]
        return [cls.of(references, number, group) if here else cls(none, none) for number, here in enumerate(held)]

    @classmethod
    def of(cls, references: ReferenceSet, class_index: int = 0, group: PointGroup | None = None) -> "RelatedRotations":
        """Of a class's map, to the shell that its halves agree to.

        Under a point group all of its rotations are equivalent, and one of each coset g S beyond it is similar.
        """
        mean, device = references.mean(class_index) * references.mask[class_index], references.maps.device
        known = None if group is None else group.others.cpu()
        found = symmetry_operations(mean.cpu(), others=known, least=SIMILAR)
        similar = torch.stack([one.rotation.mT for one in found])[1:]
        if group is not None:
            similar = _on_cpu(group).beyond(similar)
            found = [found[0], *(one for one in found if (one.rotation.mT == similar).all((1, 2)).any())]
        radius = references.resolution(0.143)[0]
        first, second = (half.cpu() * references.mask[class_index].cpu() for half in references.maps[class_index])
        scores = compare_turned(first, second, found, radius) if len(similar) else [1.0]
        alike = torch.tensor([score >= ALIKE * scores[0] for score in scores[1:]], dtype=torch.bool)
        agreement = min([score / scores[0] for score in scores[1:] if score >= ALIKE * scores[0]], default=1.0)
        equivalent = similar[alike].to(device)
        if group is not None:
            equivalent = torch.cat([group.others, *(group.rotations @ one for one in equivalent)])
        return cls(similar.to(device), equivalent, agreement, tuple(found[1:]))

    def told(self, group: PointGroup | None) -> str:
        """What the map's symmetry seems to be, where that is more than the run's point group; else nothing."""
        seen = generated_group(self.equivalent.cpu().unbind())
        if seen is None or len(symmetry_rotations(seen)) <= (1 if group is None else len(group)):
            return ""
        return (
            f"the map agrees with itself under {seen} at {self.agreement:.2f} of what its halves agree: try "
            f"--symmetry {seen}"
        )


def _on_cpu(group: PointGroup) -> PointGroup:
    return PointGroup(group.name, group.rotations.cpu())


@dataclass(frozen=True, eq=False)
class RelatedPoses:
    """Poses at which a map shows almost the same: with V(S (x − u)) ≈ V(x), (R, t) and (S R, t + (Rᵀ u)_xy).

    Attributes:
        rotation: S, the identity first.
        offset: u as a share of the box: the axis need not go through the centre.
    """

    rotation: Float[Tensor, "g 3 3"]
    offset: Float[Tensor, "g 3"]

    @classmethod
    def none(cls, device: torch.device) -> "RelatedPoses":
        """The identity alone."""
        return cls(torch.eye(3, device=device)[None], torch.zeros(1, 3, device=device))

    @classmethod
    def of(
        cls, volume: Float[Tensor, "n n n"], most: int, *, centred: bool, group: PointGroup | None = None
    ) -> "RelatedPoses":
        """Of a map.

        Args:
            volume: the map.
            most: operations kept, the identity among them.
            centred: no pose has a shift.
            group: whose own operations are left out; None: C1.
        """
        known = None if group is None else group.others.cpu()
        found = symmetry_operations(volume.cpu(), others=known, least=SIMILAR)[:most]
        offset = torch.stack([one.shift_px for one in found]) / volume.shape[-1]
        rotation = torch.stack([one.rotation.mT for one in found])
        return cls(rotation, torch.zeros_like(offset) if centred else offset)

    @classmethod
    def of_leader(
        cls,
        volume: Float[Tensor, "n n n"],
        most: int,
        world: World,
        *,
        centred: bool,
        group: PointGroup | None = None,
    ) -> "RelatedPoses":
        """Of a map, found by worker 0 for all: others might round otherwise. Collective."""
        found = torch.zeros(most, 3, 4)
        if world.is_leader:
            some = cls.of(volume, most, centred=centred, group=group)
            found[: len(some)] = torch.cat([some.rotation, some.offset[..., None]], -1)
        found = found.to(volume.device)
        world.all_reduce_(found)
        found = found[found[..., :3].abs().sum((1, 2)) > 0]  # host sync
        return cls(found[..., :3].contiguous(), found[..., 3].contiguous())

    def __len__(self) -> int:
        return len(self.rotation)

    def all(
        self, rotation: Float[Tensor, "*b 3 3"], shift: Float[Tensor, "*b 2"]
    ) -> tuple[Float[Tensor, "g *b 3 3"], Float[Tensor, "g *b 2"]]:
        """Every related pose of each; shifts are shares of the box."""
        turned = torch.einsum("gij,...jk->g...ik", self.rotation, rotation)
        return turned, shift + torch.einsum("...jk,gj->g...k", rotation, self.offset)[..., :2]

    def at(
        self, which: Int[Tensor, " b"], rotation: Float[Tensor, "b 3 3"], shift: Float[Tensor, "b 2"]
    ) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """One related pose of each."""
        moved = (rotation.mT @ self.offset[which][..., None])[:, :2, 0]
        return self.rotation[which] @ rotation, shift + moved

    def state_dict(self) -> dict[str, Tensor]:
        """Operations."""
        return {"rotation": self.rotation.cpu(), "offset": self.offset.cpu()}


def angle_modulo(
    a: Float[Tensor, "b 3 3"], b: Float[Tensor, "b 3 3"], equivalent: Float[Tensor, "e 3 3"] | None
) -> Float[Tensor, " b"]:
    """Angle in degrees between rotations, of all that are equivalent to the second the nearest."""
    if equivalent is None:
        return geodesic_angle(a, b)
    turns = torch.cat([torch.eye(3).to(equivalent)[None], equivalent])
    return geodesic_angle(a, nearest_turned(turns, b, a))
