"""The protocol of a stage: one way to learn from a stream of particles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.image_signal import ImageSignal
from scalecryo.map.reference import ReferenceSet
from scalecryo.model.autoencoder import AutoEncoder
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.encoder_training import PoseLearner
from scalecryo.train.particle_coordinates import Coordinates
from scalecryo.train.particle_source import BatchRequest
from scalecryo.train.particle_state import ParticleState


@dataclass
class Learned:
    """What stages hand on.

    Attributes:
        particles: last pose of every particle.
        references: half-maps of every class.
        first_maps: of the classes that an ensemble found, at the store's smallest level, before they have references.
        class_shares: of the particles in each class of one assembly, as its labels were found; empty: they were not.
        labels_stay: whether the particles' classes are found, and only that of a new one is asked.
        groups: noise of each optics group and scale of each micrograph; None: not sought.
        start_gain: log-likelihood that an image gains by the start's map over an empty one; None: there was no start.
        shift_radius: of a disc that holds nearly all shifts, Å; None: not known.
        shift_sigma: standard deviation of the shifts along x and y, Å; None: not known.
        encoder: that learns to pose while references are refined.
        model: the paper's auto-encoder.
        steps: that curves and checkpoints count before the refinement's first iteration.
        posed: every particle at the pose that the final pass gave it.
        identity: of the particles and the checkpoint that these poses are of.
        components: the linear model of continuous variety.
        coordinates: every particle's place in it, and what it shows.
        signal: of the images; None: not known.
        notes: what a person who looks at the result should know of how it was found.
    """

    particles: ParticleState
    references: ReferenceSet | None = None
    first_maps: Float[Tensor, "k n n n"] | None = None
    class_shares: tuple[float, ...] = ()
    labels_stay: bool = False
    groups: ImageGroups | None = None
    start_gain: float | None = None
    shift_radius: float | None = None
    shift_sigma: float | None = None
    encoder: PoseLearner | None = None
    model: AutoEncoder | None = None
    steps: int = 0
    posed: ParticleState | None = None
    identity: str = ""
    components: ComponentModel | None = None
    coordinates: Coordinates | None = None
    signal: ImageSignal | None = None
    notes: tuple[str, ...] = ()


class Stage(Protocol):
    """Expectation maximisation at a resolution, gradient descent, or the final pass; a loop of passes over batches."""

    name: str
    """What a checkpoint says where the run stands."""

    def request(self) -> BatchRequest:
        """What the next pass reads. Called once before each pass."""

    def step(self, *images: ParticleImages) -> None:
        """One batch: E-step and sums, or forward, backward, optimiser. A record of the batch for each level asked."""

    def finish_pass(self, world: World) -> PassReport:
        """End the pass: reduce over the workers, solve, measure. Collective."""

    def done(self) -> bool:
        """Whether another pass is needed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps between two passes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
