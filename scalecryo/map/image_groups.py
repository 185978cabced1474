"""What images of one optics group and of one micrograph share: a noise spectrum, and a scale of the signal.

Images are whitened when they are read: the transforms and the contrast transfer of an image are multiplied, shell by
shell, by the root of the common noise over that of its optics group, and the contrast transfer by its micrograph's
scale. All that follows knows one noise spectrum, and likelihoods, residuals and sums of images are weighted rightly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.particle_images import ParticleImages

OPTICS_GROUPS, MICROGRAPHS = 1024, 1 << 17  # that are told apart; numbers beyond share with others
# Of the common spectrum in that of every optics group: one image of sixteen is looked at, so these stand for the 50
# that RELION takes for small groups.
PRIOR_IMAGES = 3.0
WIDEST_SCALE = 5.0  # times the median, and down to its inverse, as in RELION
CHANCE = 3.0  # standard errors of the scatter of the scales that noise alone gives: what is within is no spread


class ImageGroups:
    """Noise of each optics group and scale of each micrograph, as one iteration found them, and the next one's sums."""

    def __init__(self, box_size: int, device: torch.device | str) -> None:
        """
        Args:
            box_size: of the store's largest level, px: shells are those of its Fourier pixels, whatever the level.
            device: of the images.
        """
        shells = box_size // 2 + 2
        self._noise: Float[Tensor, "groups shells"] | None = None
        """Noise of each group over the common one; None: of all the same."""
        self._scale: Float[Tensor, " micrographs"] | None = None
        self._power = torch.zeros(OPTICS_GROUPS, shells, dtype=torch.float64, device=device)
        self._count = torch.zeros_like(self._power)
        self._images = torch.zeros(OPTICS_GROUPS, dtype=torch.float64, device=device)
        self._product = torch.zeros(MICROGRAPHS, dtype=torch.float64, device=device)
        self._predicted = torch.zeros_like(self._product)

    def corrected(self, images: ParticleImages) -> ParticleImages:
        """The same particles with the common noise, and their scale in the contrast transfer.

        Real-space images do not go with them; images that need no correction are returned as they are.
        """
        weight, scale = self._weight(images.optics_group, images.pixels), self._scale_of(images.micrograph)
        if weight is None and scale is None:
            return images
        transforms = images.transforms if weight is None else images.transforms * weight
        ctf = torch.ones_like(transforms.real) if images.ctf is None else images.ctf
        ctf = ctf if weight is None else ctf * weight
        return images.with_transforms(transforms, ctf if scale is None else ctf * scale[:, None])

    def weighted(self, sums: CtfWeightedImages, images: ParticleImages) -> CtfWeightedImages:
        """CTF-weighted images that were not corrected, as if they had been: the weight by the noise enters squared."""
        weight, scale = self._weight(images.optics_group, images.pixels), self._scale_of(images.micrograph)
        if weight is None and scale is None:
            return sums
        squared = torch.ones_like(sums.values.real) if weight is None else weight.square()
        by_scale = torch.ones_like(squared[:, :1]) if scale is None else scale[:, None]
        power = torch.ones_like(squared) if sums.power is None else sums.power
        return CtfWeightedImages(sums.values * (squared * by_scale), power * (squared * by_scale.square()))

    def add_residuals(self, residual: Complex[Tensor, "b p"], images: ParticleImages) -> None:
        """Take in residuals of corrected images: the noise is that before the correction, over the box."""
        weight = self._weight(images.optics_group, images.pixels)
        squared = (residual.real.square() + residual.imag.square()) / images.box_size**2
        if weight is not None:
            squared = squared / weight.square()
        hermitian, shell = images.pixels.weight.double(), self._shells(images.pixels)
        group = _group(images.optics_group)
        by_shell = squared.new_zeros(len(squared), self._power.shape[1], dtype=torch.float64)
        by_shell.index_add_(1, shell, squared.double() * hermitian)
        pixels = by_shell.new_zeros(self._power.shape[1]).index_add_(0, shell, hermitian)
        self._power.index_add_(0, group, by_shell)
        self._count.index_add_(0, group, pixels.expand_as(by_shell))
        self._images.index_add_(0, group, by_shell.new_ones(len(group)))

    def add_products(
        self, predicted: Complex[Tensor, "b p"], images: ParticleImages, pixel_weight: Float[Tensor, " p"]
    ) -> None:
        """Take in what corrected images have in common with their predictions.

        Args:
            predicted: of the images, at the scale they have now.
            images: corrected.
            pixel_weight: Hermitian weight over the common noise.
        """
        observed, scale = images.transforms, self._scale_of(images.micrograph)
        product = (observed.real * predicted.real + observed.imag * predicted.imag).double() @ pixel_weight.double()
        power = (predicted.real.square() + predicted.imag.square()).double() @ pixel_weight.double()
        if scale is not None:
            product, power = product / scale.double(), power / scale.double().square()
        at = _micrograph(images.micrograph)
        self._product.index_add_(0, at, product * images.weight)
        self._predicted.index_add_(0, at, power * images.weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, to be reduced over workers."""
        return self._power, self._count, self._images, self._product, self._predicted

    def update(self) -> None:
        """Noise and scales for the next iteration, from the sums, which begin anew. Host sync."""
        self._noise = _relative_noise(self._power, self._count, self._images)
        self._scale = relative_scales(self._product, self._predicted)
        for tensor in self.tensors():
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps between two iterations."""
        return {
            "noise": None if self._noise is None else self._noise.cpu(),
            "scale": None if self._scale is None else self._scale.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        device = self._power.device
        self._noise = None if state["noise"] is None else state["noise"].to(device)
        self._scale = None if state["scale"] is None else state["scale"].to(device)

    def _shells(self, pixels: FourierPixels) -> Int[Tensor, " p"]:
        return pixels.shell.clamp(max=self._power.shape[1] - 1)

    def _weight(self, group: Int[Tensor, " b"], pixels: FourierPixels) -> Float[Tensor, "b p"] | None:
        """Root of the common noise over each image's."""
        if self._noise is None:
            return None
        return self._noise[_group(group).clamp(max=len(self._noise) - 1)].rsqrt()[:, self._shells(pixels)]

    def _scale_of(self, micrograph: Int[Tensor, " b"]) -> Float[Tensor, " b"] | None:
        if self._scale is None:
            return None
        at = _micrograph(micrograph)
        known = self._scale[at.clamp(max=len(self._scale) - 1)]
        return torch.where(at < len(self._scale), known, torch.ones_like(known))


def _group(optics_group: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    return optics_group.long().clamp(0, OPTICS_GROUPS - 1)


def _micrograph(micrograph: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    return micrograph.long() % MICROGRAPHS


def _relative_noise(
    power: Float[Tensor, "groups shells"], count: Float[Tensor, "groups shells"], images: Float[Tensor, " groups"]
) -> Float[Tensor, "known shells"] | None:
    """Noise of every optics group over that of all, drawn to 1 by the prior's images; None for a single group.

    Shells that were not seen are as the last one that was.
    """
    groups = images.nonzero()[:, 0]  # host sync
    if len(groups) < 2:
        return None
    own = slice(0, int(groups[-1]) + 1)
    total = count.sum(0)
    seen = total > 0
    common = power.sum(0) / total.clamp_min(1e-30)
    each = (count / images.clamp_min(1)[:, None]).amax(0)  # Fourier pixels of one image in the shell
    prior = PRIOR_IMAGES * each
    ratio = (power[own] + prior * common) / ((count[own] + prior) * common.clamp_min(1e-30)).clamp_min(1e-30)
    last = int(seen.nonzero()[-1])
    ratio = torch.where(seen, ratio, ratio[:, last : last + 1]).float()
    ratio[:, 0] = 1.0  # the mean carries no noise that is known
    return ratio


def relative_scales(product: Float[Tensor, " m"], predicted: Float[Tensor, " m"]) -> Float[Tensor, " known"] | None:
    """Scale of each micrograph over the median; None where they differ by no more than noise.

    A micrograph's own estimate is Σ Re(Y conj(P)) / Σ |P|², as in RELION, with the variance 1 / Σ |P|² in units of the
    noise. Scales of all scatter about 1 by more than that: the rest is their spread, and each is drawn to 1 by it.

    Args:
        product, predicted: the two sums of each micrograph, over the noise.
    """
    seen = predicted > 0
    if int(seen.sum()) < 2:  # host sync
        return None
    value, power = product[seen] / predicted[seen], predicted[seen]
    order = value.argsort()
    mass = power[order].cumsum(0)
    median = value[order][int((mass < mass[-1] / 2).sum())].clamp_min(1e-6)
    value, power = value / median, power * median.square()
    scatter, number = float((power * (value - 1).square()).sum()), len(value)
    spread = scatter - number
    if spread < CHANCE * (2 * number) ** 0.5:
        return None
    prior = float(power.sum()) / spread
    scale = predicted.new_ones(len(predicted))
    scale[seen] = ((power * value + prior) / (power + prior)).clamp(1 / WIDEST_SCALE, WIDEST_SCALE)
    return scale[: int(seen.nonzero()[-1]) + 1].float()
