"""One map of all particles, and their poses against it, before they are told apart (one assembly in several states)."""

from scalecryo.distributed.world import World
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.refinement import Refinement


class CommonMap(Refinement):
    """The refinement of a single map, as long as particles jump between modes; at imported poses one iteration.

    It also tells which images show no particle, and the scales of the micrographs: neither is to make a class.
    """

    name = "common map"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """See `Refinement`."""
        super().__init__(context, learned)
        self._schedule.patient = False  # particles unlike the common map go on jumping
        self._least = 1 if context.config.recipe == "poses" else 0

    def finish_pass(self, world: World) -> PassReport:
        """See `Refinement`; the curves of the classes' refinement go on after its last iteration. Collective."""
        report = super().finish_pass(world)
        if self.done():
            self._learned.steps = report.step
        return report

    def done(self) -> bool:
        """Whether particles have found their modes."""
        return super().done() or (self._schedule.number >= self._least and not self._schedule.searched)
