"""What the stages that follow the components share: passes that are made anew, not taken up."""

from collections.abc import Mapping
from typing import Any

import torch

from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.estimator import map_weight
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.particle_source import RunContext
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.stage import Learned

VALUES_AT_ONCE = 1 << 24  # of the images of a part: 64 MiB


class ComponentStage:
    """Base of passes with components that were learnt before; what they find lies in parts, not in a checkpoint."""

    def __init__(self, context: RunContext, learned: Learned) -> None:
        self._context, self._learned = context, learned

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the pass is made anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    @property
    def _model(self) -> ComponentModel:
        assert self._learned.components is not None, "the components come first"
        return self._learned.components


def posed_parts(images: ParticleImages, context: RunContext, learned: Learned, count: int) -> list[PosedImages]:
    """A batch at the poses of the final pass, in parts of about the same memory.

    Args:
        images: of the batch.
        context: of the run.
        learned: poses, and the noise of groups.
        count: of components, which the memory depends on as on the box.
    """
    if learned.groups is not None:
        images = learned.groups.corrected(images)
    channels = 2 * count + count * (count + 1) // 2
    at_once = max(1, VALUES_AT_ONCE // (channels * len(images.pixels)))
    order = torch.arange(len(images), device=images.rows.device)
    if len(images) <= at_once:
        return [_posed(images, context, learned)] if len(images) else []
    return [_posed(images.select(some), context, learned) for some in order.split(at_once)]


def _posed(images: ParticleImages, context: RunContext, learned: Learned) -> PosedImages:
    assert learned.posed is not None, "the final pass comes first"
    poses, seen = learned.posed.read(images.rows)
    # A model's confidence is how well it explains the image, no probability.
    weight = poses.particle_probability if learned.references is None else map_weight(poses)
    return PosedImages.of(images, poses, weight * seen * context.chosen(images.rows))
