"""The classes of one assembly, told apart once more at refined poses.

The refinement compares each particle with its own half's maps, which hold the particle itself: its own noise keeps it
in its class, right or wrong. Here it is compared with maps of the particles of other parts, of both halves, in one
frame for all classes.
"""

from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align import Alignment
from scalecryo.map.class_differences import tied_classes
from scalecryo.physics.fsc import weight_shells
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_shares import shares_of_labels
from scalecryo.train.stages.classification import REGULARISATION, Classification
from scalecryo.train.stages.final_poses import lay_onto
from scalecryo.train.stages.on_axes import moved_poses
from scalecryo.train.stages.schedule import SEARCH_LEVEL

RADIUS = 28.0  # Fourier pixels at most; at 64 px the sums of all parts are small


class Relabelling(Classification):
    """Passes from the labels of the refinement; the last one labels every particle, which no later pass asks again."""

    name = "class labels"
    starts = 1
    radii = (RADIUS,)
    most_passes, least_passes = (12,), (3,)

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: the classes' maps, and a pose and a class of every particle; gets new labels.
        """
        super().__init__(context, learned)
        self._frames: dict[tuple[int, int], Alignment] = {}
        """Of each class and half, onto the first one's."""
        self._finished = False

    def done(self) -> bool:
        """Whether the particles are labelled."""
        return self._finished

    def _radius(self) -> float:
        levels = [level for level in self._context.levels if level <= SEARCH_LEVEL] or [min(self._context.levels)]
        return min(super()._radius(), max(levels) / 2 - 1)

    def _batches(self, epoch: int) -> int:
        return epoch if self._last else super()._batches(epoch)

    def _pass_name(self) -> str:
        return "class_labels"

    def _first_shares(self, batch: ParticleImages, known: PoseEstimates, start: int) -> Float[Tensor, "b classes"]:
        """By the labels that are known."""
        return shares_of_labels(known.class_index, known.class_probability.double(), self._classes)

    def _in_common_frame(self, known: PoseEstimates, batch: ParticleImages) -> PoseEstimates:
        self._frames = self._frames or self._frames_of_classes()
        return self._moved(known, batch, self._frames)

    def _in_class_frame(self, found: PoseEstimates, batch: ParticleImages) -> PoseEstimates:
        return self._moved(found, batch, {which: _inverse(frame) for which, frame in self._frames.items()})

    def _moved(
        self, poses: PoseEstimates, batch: ParticleImages, frames: dict[tuple[int, int], Alignment]
    ) -> PoseEstimates:
        for (number, half), frame in frames.items():
            at = ((poses.class_index == number) & (batch.half == half)).nonzero()[:, 0]  # host sync
            if len(at):
                poses = poses.put(at, moved_poses(poses.select(at), frame, self._common.pixel_size))
        return poses

    def _frames_of_classes(self) -> dict[tuple[int, int], Alignment]:
        """How each half's map of each class turns and moves onto the first class's first half: a little."""
        common, group = self._common, self._context.point_group
        shown = [
            [weight_shells(half, common.curve(number).clamp(0, 1)) * common.mask[number] for half in halves]
            for number, halves in enumerate(common.maps)
        ]
        return {
            (number, half): lay_onto(volume, shown[0][0], (), group)
            for number, halves in enumerate(shown)
            for half, volume in enumerate(halves, 1)
        }

    def _solved_without(
        self, own: int, owned: OwnedSums, mask: Float[Tensor, "n n n"]
    ) -> Float[Tensor, "starts classes n n n"]:
        """The mean over the classes and each one's difference from it, both as far as the halves share them."""
        halves, shares = owned.solve_tied(self._share, REGULARISATION, without=own)
        return tied_classes(halves, shares[0], mask, joined=True).transpose(0, 1)

    def _end(self, owned: OwnedSums, world: World) -> None:
        """Labels, which are kept; the final pass makes the maps."""
        self._learned.class_shares = tuple(self._share[0].tolist())  # host sync
        self._learned.labels_stay = True
        self._learned.particles.commit(world)
        self._finished = True


def _inverse(alignment: Alignment) -> Alignment:
    turn = alignment.rotation.mT
    return Alignment(turn, False, -turn @ alignment.shift_px, alignment.score)
