"""How much memory a training step takes: a count of its tensors, to choose box and batch by."""

import math
from typing import NamedTuple

from scalecryo.physics.fourier_slice import padded_box


class StepMemory(NamedTuple):
    """Bytes that a step holds at its peak, by what they are for.

    Attributes:
        parameters: voxels and encoder with gradients and Adam's two moments, and the volume's two masks.
        activations: what the encoder keeps for its backward pass.
        images: the batch and its packed Fourier pixels.
        transforms: what the volume's transform and its gradient need at once.
        passing: the encoder's largest gradients, while the transforms are not there.
    """

    parameters: int
    activations: int
    images: int
    transforms: int
    passing: int

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of the step."""
        return self.parameters + self.activations + self.images + max(self.transforms, self.passing)


def step_memory(
    box_size: int,
    batch_size: int,
    *,
    padding: float = 2.0,
    channels: tuple[int, ...] = (32, 64, 128),
    hidden: int = 512,
    input_box: int = 0,
    outputs: int = 8,
    bytes_each: int = 4,
) -> StepMemory:
    """Memory of one step of the paper's recipe: encoder, volume, one candidate pose a particle, Adam.

    Counts tensors. Libraries add to it: convolutions and transforms their workspaces (on a GPU up to another quarter),
    the allocator what it keeps in reserve.

    Args:
        box_size: px, of the images and the volume.
        batch_size: particles of one worker.
        padding: oversampling of the volume's transform.
        channels: of the encoder's blocks; none for other pose sources.
        hidden: units of its fully connected layers.
        input_box: px that it crops the images to; 0: box_size.
        outputs: numbers of a pose.
        bytes_each: of the encoder's activations: 4, or 2 for bfloat16.
    """
    d, side = padded_box(box_size, padding), input_box or box_size
    voxels, transform = box_size**3, 8 * d * d * (d // 2 + 1)
    weights, kept, passing, previous = 0, batch_size * side * side * bytes_each, 0, 1
    for width in channels:
        weights += 9 * width * (previous + width) + 2 * width
        layer = batch_size * width * side * side
        # Both layers after their ReLU; the pooled one with the places of its maxima.
        kept += 2 * layer * bytes_each + layer // 4 * (bytes_each + 8)
        # Arriving and leaving gradient of a layer, and its pooled one.
        passing = max(passing, 2 * layer * bytes_each + layer // 4 * bytes_each)
        previous, side = width, side // 2
    if channels:
        weights += previous * side * side * hidden + hidden * (hidden + outputs + 2) + outputs
    pixels = math.pi * (box_size / 2 - 1) ** 2 / 2
    # Observed, CTF, predicted, residual, its square and the gradient: 8 bytes complex, 4 real; twice while one
    # becomes another.
    packed = round(batch_size * pixels) * 48
    return StepMemory(
        parameters=16 * (voxels + weights) + 8 * voxels,
        activations=kept if channels else 0,
        images=batch_size * box_size * box_size * 4 + packed,
        # The gradient of the transform beside the transform, or beside its own first inverse transform.
        transforms=2 * transform,
        passing=passing,
    )
