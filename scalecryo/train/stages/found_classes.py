"""Rounds of the start with the classes that an ensemble found, from their first maps (`train.classes = auto`)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.paused import Pause
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_restarts import ClassRestarts


class FoundRounds(ClassRestarts):
    """A start of several classes whose first maps are known; all else is as from random poses."""

    least_rounds = 2
    balanced_rounds = 0
    _begins_with_maps = True

    def __init__(self, context: RunContext, learned: Learned, first_maps: Float[Tensor, "k n n n"]) -> None:
        """
        Args:
            context: of the run.
            learned: gets better maps.
            first_maps: of the classes that the ensemble found.
        """
        self._first_maps = first_maps
        super().__init__(context, learned, classes=len(first_maps), starts=1)

    def _solved(self, start: int) -> list[Float[Tensor, "n n n"]]:
        """At first the given maps."""
        return list(self._first_maps) if self._given else super()._solved(start)

    def _first_references(self) -> ReferenceSet:
        """Without classes that were given up: their number was not asked for."""
        held = self._balance.share[self._going[0]] > 0
        return super()._first_references().select(held.nonzero()[:, 0])  # host sync


class FoundClassStart:
    """These rounds as a stage: their number of classes is known only when it begins."""

    name = "class start"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: the classes that were found; gets references.
        """
        self._context, self._learned = context, learned
        self._rounds: FoundRounds | None = None

    @property
    def _begun(self) -> FoundRounds:
        if self._rounds is None:
            assert self._learned.first_maps is not None, "an ensemble comes first"
            self._rounds = FoundRounds(self._context, self._learned, self._learned.first_maps)
        return self._rounds

    def request(self) -> BatchRequest:
        """See `StartRounds`, as all that follows."""
        return self._begun.request()

    def step(self, *images: ParticleImages) -> None:
        """One batch."""
        self._begun.step(*images)

    def finish_pass(self, world: World) -> PassReport:
        """Collective."""
        return self._begun.finish_pass(world)

    def pause(self) -> Pause | None:
        """Not before a checkpoint, which is near."""
        return self._begun.pause()

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """Nothing was kept within a pass."""
        return self._begun.resume_pass(pause)

    def done(self) -> bool:
        """Whether there are references."""
        return self._rounds is not None and self._rounds.done()

    def state_dict(self) -> dict[str, Any]:
        """The rounds, and what they began with."""
        assert self._learned.first_maps is not None, "an ensemble comes first"
        notes = list(self._learned.notes)
        return {"maps": self._learned.first_maps.cpu(), "notes": notes, "rounds": self._begun.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._learned.first_maps = state["maps"].to(self._context.device)
        self._learned.notes = tuple(state["notes"])
        self._begun.load_state_dict(state["rounds"])
