"""Which iterations of the refinement offer particles related poses, and which poses these are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scalecryo.distributed.world import World
from scalecryo.map.reference import ReferenceSet
from scalecryo.pose.related import RelatedPoses, RelatedRotations
from scalecryo.train.particle_source import RunContext

MOST = 60  # poses: what an icosahedron relates
FARTHER = 1.1  # times the radius at which they were found, beyond which they are found anew
# Asymmetric share of the maps' power, and its factor from one iteration to the next, above which a real asymmetry
# grows: 0.010 and 1.1 to 1.3 with GroEL without a chain; 0.0024 and 1.00 to 1.02 with 6VXX, whose related poses only
# noise tells apart.
NOTICED, GROWS = 2e-3, 1.05
RARE = 0.01  # share of the offers to either half that are taken, below which no more are made


@dataclass(frozen=True, eq=False)
class RelatedOffer:
    """What particles are offered in an iteration.

    Attributes:
        poses: that the maps relate.
        references: that tell them apart.
    """

    poses: RelatedPoses
    references: ReferenceSet


class RelatedOffers:
    """Offers go to one half an iteration, as long as they are taken: where the halves prefer different poses of those
    that their maps relate, both would change over, and back.

    Attributes:
        asymmetry: of the maps that told the poses apart in each iteration (`pseudo_symmetry`).
    """

    def __init__(self) -> None:
        self._any = False
        self._poses: RelatedPoses | None = None
        self._radius = 0.0
        self.asymmetry: list[float] = []
        self._taken: list[float] = []  # shares of the offers of each iteration that made any

    def look_at(self, related: RelatedRotations, world: World) -> None:
        """Whether there is anything to offer, as worker 0 sees it: others might round otherwise. Collective."""
        seen = torch.zeros(1, device=related.similar.device)
        if world.is_leader and len(related.similar):
            seen += 1
        world.all_reduce_(seen)
        self._any = bool(seen)  # host sync

    @property
    def any(self) -> bool:
        """Whether there is something to offer, and any of the last offers was taken."""
        return self._any and (len(self._taken) < 2 or max(self._taken[-2:]) >= RARE)

    @property
    def going_on(self) -> bool:
        """Whether one half had no offers yet, or the maps become ever more asymmetric: poses are being told apart."""
        last = self.asymmetry[-3:]
        factor = GROWS ** (len(last) - 1)
        changing = len(last) > 1 and last[-1] > NOTICED and not last[0] / factor <= last[-1] <= factor * last[0]
        return self.any and (len(self._taken) == 1 or changing)

    def at(self, references: ReferenceSet, radius: float, context: RunContext) -> RelatedPoses | None:
        """Poses to offer in an iteration with references of one class; None: none. Collective."""
        if not self.any:
            return None
        if self._poses is None or radius > FARTHER * self._radius:
            with context.world.timer.part("symmetry"):
                self._poses = RelatedPoses.of_leader(
                    references.mean() * references.mask[0], MOST, context.world, centred=not context.fit_shift,
                    group=context.point_group,
                )  # fmt: skip
            self._radius = radius
        self._any = len(self._poses) > 1
        return self._poses if self._any else None

    def note(self, share: float | None) -> None:
        """Which share of an iteration's offers was taken; None: there were none."""
        if share is not None:
            self._taken.append(share)

    def state_dict(self, offer: RelatedOffer | None) -> dict[str, Any]:
        """What a checkpoint keeps of it, and of what the next iteration offers."""
        poses = None if self._poses is None else self._poses.state_dict()
        references = None if offer is None else offer.references.state_dict()
        return {
            "any": self._any, "poses": poses, "radius": self._radius, "taken": list(self._taken),
            "references": references, "asymmetry": list(self.asymmetry),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> RelatedOffer | None:
        """What `state_dict` gave; returns the offer."""
        poses, references = state["poses"], state.get("references")  # older checkpoints have no references
        self._poses = None if poses is None else RelatedPoses(**{name: part.to(device) for name, part in poses.items()})
        self._any, self._radius, self._taken = state["any"], state["radius"], list(state["taken"])
        self.asymmetry = list(state.get("asymmetry", []))  # older checkpoints have none
        if self._poses is None or references is None:
            return None
        return RelatedOffer(self._poses, ReferenceSet.from_state_dict(references, device))
