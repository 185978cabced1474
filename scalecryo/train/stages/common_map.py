"""One map of all particles, and their poses against it, before they are told apart (`class_mode = docked`)."""

from scalecryo.distributed.world import World
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.refinement import Refinement


class CommonMap(Refinement):
    """The refinement of a single map, as long as particles jump between modes."""

    name = "common map"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """See `Refinement`."""
        super().__init__(context, learned)
        self._schedule.patient = False  # particles unlike the common map go on jumping

    def finish_pass(self, world: World) -> PassReport:
        """See `Refinement`; the curves of the classes' refinement go on after its last iteration. Collective."""
        report = super().finish_pass(world)
        if self.done():
            self._learned.steps = report.step
        return report

    def done(self) -> bool:
        """Whether particles have found their modes."""
        return super().done() or not self._schedule.searched
