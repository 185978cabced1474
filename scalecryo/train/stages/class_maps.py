"""Maps of the classes of one assembly, freed of the poses that they were told apart at (`class_mode = docked`).

A conformation that is far from the common map had wrong poses there: its own first map is smeared, and a refinement
from it stays so. Rounds of the start, in which all poses are looked at, begin with the classes' maps. The labels stay:
they were found with the maps of all particles, and maps of a few batches do not tell compositions apart.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.reference import References, c_ref
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.fsc import weight_shells
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.class_posterior import ClassPosterior
from scalecryo.pose.particle_probability import pose_gain
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_shares import LEAST_SHARE, shares_of_labels
from scalecryo.train.stages.class_start import COUNTED, ClassStart


class ClassMaps(ClassStart):
    """Rounds of a start whose first maps are known."""

    name = "class maps"
    least_rounds, most_rounds = 2, 6
    balanced_rounds = 0
    _begins_with_maps = True

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: the classes' maps; gets better ones.
        """
        super().__init__(context, learned, starts=1)
        self._imposed = context.point_group  # the common map lies on its axes
        self._even_batch = self._batch
        self._prepared: References = {}
        """The classes' first maps, for particles without a label."""

    def request(self) -> BatchRequest:
        """Batches in which the smallest class has as many particles as it would have if all were of one size."""
        shares = self._learned.class_shares
        if self._step == 0 and shares:
            self._read_in(int(self._even_batch / max(min(shares) * self._classes, LEAST_SHARE)))
        return super().request()

    def finish_pass(self, world: World) -> PassReport:
        """See `ClassStart`. Nothing is saved: a run that was killed begins again after the common map. Collective."""
        return replace(super().finish_pass(world), checkpoint=False)

    def _begin(self, batch: ParticleImages, world: World) -> None:
        """The noise of the refinement before."""
        assert self._learned.references is not None, "the classes' maps come first"
        found = self._learned.references.level_noise(self._sums.box_size, self._pixels)
        for own, other in zip(self._noise.tensors(), found.tensors(), strict=True):
            own.copy_(other)

    def _solved(self, start: int) -> list[Float[Tensor, "n n n"]]:
        """At first the given maps."""
        references = self._learned.references
        if not self._given or references is None:
            return super()._solved(start)
        maps = [weight_shells(references.mean(k), c_ref(references.curve(k))) for k in range(references.classes)]
        return [fourier_resize_3d(volume, self._sums.box_size) for volume in maps]

    def _shares(self, batch: ParticleImages, start: int, classes: ClassPosterior) -> Float[Tensor, "b classes"]:
        """By the labels."""
        share = self._labels(batch)
        return torch.where(share > COUNTED, share, 0.0)

    def _labels(self, batch: ParticleImages) -> Float[Tensor, "b classes"]:
        """How much each image belongs to each class: by its label, or where it has none by the maps at its pose.

        Junk belongs to none: it may all have the label of one class.
        """
        known, seen = self._learned.particles.read(batch.rows)
        references, classes = self._learned.references, self._classes
        assert references is not None, "the classes' maps come first"
        share = shares_of_labels(known.class_index, known.class_probability, classes)
        self._prepared = self._prepared or references.at(batch.box_size, batch.pixels)
        gain = torch.zeros(len(batch), classes, dtype=torch.float64, device=batch.rows.device)
        for half in (1, 2):
            at = batch.rows_by_half[half - 1]
            own, poses = batch.select(at), known.select(at)
            for number in range(classes if len(at) else 0):
                gain[at, number] = pose_gain(own, poses, self._prepared[number, half], batch.pixels.radius_limit)
        prior = torch.tensor(self._learned.class_shares or [1.0] * classes, dtype=gain.dtype, device=gain.device).log()
        labelled = known.class_probability < 1
        share = torch.where(labelled[:, None], share, (gain + prior).softmax(1).float())
        # Of a particle without a label the probability is that of the common map, which it may be unlike.
        fits = torch.where(labelled, known.particle_probability, 1.0)
        return share * (fits * seen)[:, None]

    def _join_alike(self, world: World) -> bool:
        """None: compositions of one assembly are alike."""
        return False
