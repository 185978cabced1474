"""What a look at the first particles tells: nothing to learn from, a CTF that does not fit, inverted contrast."""

import logging
import math

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import TrainingError
from scalecryo.physics.mask import soft_sphere
from scalecryo.physics.particle_images import ParticleImages

logger = logging.getLogger(__name__)
LEAST_PARTICLES = 100  # two halves, a tenth of each held out
ALIKE = 1e-3  # share of the images' power that differs from image to image, below which they are one image
LOOKED_AT = 1000  # images: at -14 dB a hundred do not tell
LEAST_CTF_CORRELATION, CERTAIN = 0.02, 3.0  # of power and CTF²; in standard errors, where images say little
LEAST_CTF_SPREAD = 0.1
DARK = -0.5  # skewness; proteins and ribosomes lie above +1 in their sphere


def check_count(count: int, where: str) -> None:
    """Refuse what is too little to split, hold out and average.

    Raises:
        TrainingError: fewer particles than that.
    """
    if count < LEAST_PARTICLES:
        raise TrainingError(
            f"{where}: {count} particles to train on: the guided method needs at least {LEAST_PARTICLES}, "
            "and thousands for a structure; use more, or pose.source = 'known' with poses"
        )


class FirstLook:
    """At the first images: refuses those that are all alike, and says so where their power does not follow the CTFs."""

    def __init__(self, where: str) -> None:
        """
        Args:
            where: they lie, for messages.
        """
        self._where, self._seen = where, 0
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, batch: ParticleImages) -> None:
        """Look at a batch, unless enough were seen. Host sync.

        Raises:
            TrainingError: one image over and over.
        """
        if self._seen >= LOOKED_AT or not len(batch):
            return
        if not self._seen:
            check_unlike(batch, self._where)
            if batch.ctf is None:
                logger.info("the particles carry no CTF: their images are taken as plain projections")
        self._seen += len(batch)
        self._sums += ctf_products(batch).cpu()
        if self._seen >= LOOKED_AT:
            self.end()

    def end(self) -> None:
        """Say so where power and CTF² do not go together: right CTFs of different defocus give a positive correlation
        from image to image, small where noise is strong; those of another pixel size, unit or table do not.
        """
        count, cross, squared, found, wanted = self._sums.tolist()
        self._seen, self._sums = LOOKED_AT, torch.zeros_like(self._sums)
        if not count:
            return
        correlation, mean = cross / math.sqrt(found * wanted), cross / count
        error = math.sqrt(max(squared / count - mean**2, 1e-60) / count)
        if correlation < LEAST_CTF_CORRELATION and mean < CERTAIN * error:
            logger.warning(
                "the images' power does not follow the CTFs of the table (correlation %.3f): check pixel size, "
                "defocus unit and voltage", correlation,
            )  # fmt: skip


def check_unlike(batch: ParticleImages, where: str) -> None:
    """Refuse images that are all alike.

    Raises:
        TrainingError: one image over and over.
    """
    pixels, mean = batch.pixels, batch.transforms.mean(0)
    power = batch.transforms.abs().square().mean(0)
    differing = 1 - (mean.abs().square() * pixels.weight).sum() / (power * pixels.weight).sum().clamp_min(1e-30)
    if float(differing) < ALIKE:  # host sync: once a run
        raise TrainingError(
            f"{where}: its images are all alike (they differ by {max(float(differing), 0):.2g} of their power): "
            "one view gives no structure; check what was converted"
        )


def ctf_products(batch: ParticleImages) -> Float[Tensor, "5"]:
    """Number of images; summed over them: products of power and CTF², those squared, and the squares of either.

    Power and CTF² are what differs from the batch's mean, at Fourier pixels where the CTFs differ; zeros where they
    do not.
    """
    none = torch.zeros(5, dtype=torch.float64)
    if batch.ctf is None:
        return none
    expected = batch.ctf.square()
    spread = expected.std(0) / expected.mean(0).clamp_min(1e-6)
    power, pixels = batch.transforms.abs().square(), batch.pixels
    # Whole images differ in scale too, by their content: that says nothing of the CTF.
    power = power / (power / power.mean(0)).mean(1, keepdim=True)
    found = power / power.mean(0) - 1
    wanted = expected / expected.mean(0).clamp_min(1e-6) - 1
    weight = pixels.weight * (spread > LEAST_CTF_SPREAD)
    weight[0] = 0.0
    if float(weight.sum()) < 20:
        return none
    cross = (found * wanted * weight).sum(1).double()
    sums = [(part.square() * weight).sum().double() for part in (found, wanted)]
    return torch.stack([cross.new_tensor(float(len(cross))), cross.sum(), cross.square().sum(), *sums])


def check_contrast(volume: Float[Tensor, "n n n"], where: str) -> None:
    """Refuse a first map whose density is dark: its images' contrast is inverted.

    Raises:
        TrainingError: the skewness of the map in its sphere is clearly negative.
    """
    skew = skewness(volume)
    if skew < DARK:
        raise TrainingError(
            f"{where}: the first map is darker than its surroundings (skewness {skew:.1f}): the contrast seems "
            "inverted; convert once more with --invert, or without --uninvert"
        )


def skewness(volume: Float[Tensor, "n n n"]) -> float:
    """Of a map's voxels in the sphere that fits its box."""
    box_size = volume.shape[-1]
    inside = volume[soft_sphere(box_size, box_size / 2 - 2, edge_px=0, device=volume.device) > 0.5]
    centred = inside - inside.mean()
    return float(centred.pow(3).mean() / centred.square().mean().pow(1.5).clamp_min(torch.finfo(torch.float32).tiny))
