"""Whether an image shows the particle at all, or nothing, or something else.

Bayes at even odds, between three explanations. The particle: its evidence is the mean of exp(gain) over all poses,
where a pose's gain is its log-likelihood ratio over an empty image. Nothing: 1. Something else, as large and as bright:
a random density within a disc of the particle's diameter, with the mean and the spectrum that the particle's slices
have over all views. Noise fits one of so many poses by chance, and no better; another object fits some pose better than
noise, but not as well as it would fit itself.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.map.reference import Reference
from scalecryo.physics.fft import FourierPixels, irfft2_centred, rfft2_centred
from scalecryo.physics.image_formation import form_images, shift_ramp
from scalecryo.physics.mask import soft_disc
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_refinement import empty_cost
from scalecryo.pose.search import templates

VIEWS = 96  # that tell the mean and the spectrum of the particle's slices
EDGE_PX = 4.0  # of the disc's soft edge, in pixels of the compared resolution
LEAST_POWER = 1e-3  # of CTF² about a Fourier pixel


class RandomDensity:
    """Random densities without a mean, in a disc: what else an image may show."""

    def __init__(
        self,
        pixels: FourierPixels,
        variance: Float[Tensor, " p"],
        pixel_weight: Float[Tensor, " p"],
        diameter: float,
    ) -> None:
        """
        Args:
            pixels: that are compared.
            variance: of the densities' transforms.
            pixel_weight: Hermitian weight over the noise's variance.
            diameter: of the disc, as a share of the box.
        """
        self._noise, self._variance = pixel_weight / pixels.weight, variance
        self._small = _in_smaller_box(pixels)
        box_size = self._small.box_size
        self._disc = soft_disc(box_size, diameter * box_size / 2, EDGE_PX, device=variance.device)
        mixing = irfft2_centred(rfft2_centred(self._disc).abs().square().to(torch.complex64), box_size)
        self._mixing = mixing / mixing.amax()

    def log_evidence(self, images: ParticleImages, found: Poses) -> Float[Tensor, " b"]:
        """Of such a density at the shifts found, over an empty image.

        The image is filtered by its CTF and cut to the disc, which covers a share f of the box: of the Fourier pixels f
        are independent then, the noise has f of its variance, and the signal all of it. For CTF² stands its mean over
        the pixels that the cut mixes. Each pixel is a complex Gaussian.
        """
        pixels = images.pixels
        ctf = torch.ones_like(images.transforms.real) if images.ctf is None else images.ctf
        back = shift_ramp(-found.shift_px(images.pixel_size), pixels.kx, pixels.ky, pixels.box_size)
        share = self._disc.square().mean()
        seen = self._cut(images.transforms * back * ctf * self._noise.sqrt(), self._disc)
        power = self._cut(ctf.square().to(seen.dtype), self._mixing).real.clamp_min(LEAST_POWER)
        ratio = power * self._variance * self._noise / share
        each = seen.abs().square() / power * (ratio / (1 + ratio)) - share * ratio.log1p()
        return 0.5 * (pixels.weight * each).double().sum(-1)

    def _cut(self, values: Complex[Tensor, "b p"], window: Float[Tensor, "n n"]) -> Complex[Tensor, "b p"]:
        """Transforms of images times a window."""
        small = self._small
        return small.pack(rfft2_centred(irfft2_centred(small.unpack(values), small.box_size) * window))


class ParticleProbability:
    """Whether images show the particle of a reference."""

    def __init__(self, reference: Reference, pixels: FourierPixels, shift_radius: float) -> None:
        """
        Args:
            reference: that poses are found against.
            pixels: that are compared.
            shift_radius: of the disc of possible shifts, Å; 0 where particles are centred.
        """
        self._reference, self._pixels, self._shift_radius = reference, pixels, shift_radius
        self._weight = reference.noise.pixel_weight(pixels)
        self._mean, variance = _slice_moments(reference, pixels)
        self._other = RandomDensity(pixels, variance, self._weight, reference.diameter)

    def of(self, images: ParticleImages, found: Poses) -> Float[Tensor, " b"]:
        """Probability that each image shows the particle.

        The likeliest pose alone brings exp(gain) over the number of poses that can be told apart at the radius. Where
        images say little, many others bring as much together: by the spread of their gains, as in the random-energy
        model (Derrida 1981), all poses together fall behind a random density by (√g - √log n)², where n poses gain g
        nats over the mean view if they are right, and not at all where g < log n: nothing can tell them apart then.

        Args:
            images: of the particle or not.
            found: their likeliest poses.
        """
        near, weight = images.within(self._pixels.radius_limit), self._weight
        poses = self._log_poses(images)
        predicted, expected = predicted_images(near, found, self._reference), _formed(self._mean[None], near, found)
        empty = empty_cost(near.transforms, weight)
        gain = empty - empty_cost(near.transforms - predicted, weight)
        left = near.with_transforms(near.transforms - expected)
        other = empty - empty_cost(left.transforms, weight) + self._other.log_evidence(left, found)
        behind = (empty_cost(predicted - expected, weight).sqrt() - poses**0.5).clamp_min(0).square()
        particle = torch.logaddexp(gain - poses, other - behind)
        return torch.sigmoid(particle - torch.logaddexp(torch.zeros_like(other), other)).float()

    def _log_poses(self, images: ParticleImages) -> float:
        """Logarithm of how many poses can be told apart."""
        limit = self._pixels.radius_limit
        across = self._shift_radius / images.pixel_size * 2 * math.pi * limit / images.box_size
        return math.log(8 * math.pi**2 * limit**3 * max(1.0, math.pi * across**2))


def pose_gain(images: ParticleImages, found: Poses, reference: Reference, radius: float) -> Float[Tensor, " b"]:
    """Log-likelihood ratio of poses over an empty map, at a radius, Fourier pixels."""
    near = images.within(radius)
    weight = reference.noise.pixel_weight(near.pixels)
    left = near.transforms - predicted_images(near, found, reference)
    return empty_cost(near.transforms, weight) - empty_cost(left, weight)


def predicted_images(near: ParticleImages, found: Poses, reference: Reference) -> Complex[Tensor, "b p"]:
    """What a reference says that images hold at their poses."""
    return _formed(templates(reference.transform, found.rotation, near.pixels, reference.scale), near, found)


def _formed(slices: Complex[Tensor, "c p"], near: ParticleImages, found: Poses) -> Complex[Tensor, "b p"]:
    """Images of slices, or of one slice, at the shifts found."""
    pixels = near.pixels
    slices = slices.expand(len(near), -1)
    return form_images(slices, near.ctf, found.shift_px(near.pixel_size), pixels.kx, pixels.ky, pixels.box_size)


def _in_smaller_box(pixels: FourierPixels) -> FourierPixels:
    """The same pixels as those of the smallest box that holds them: its transforms are shorter."""
    box_size = 2 * math.ceil(pixels.radius_limit) + 2
    index = pixels.ky.round().long() % box_size * (box_size // 2 + 1) + pixels.kx.round().long()
    return replace(pixels, box_size=box_size, index=index)


def _slice_moments(reference: Reference, pixels: FourierPixels) -> tuple[Complex[Tensor, " p"], Float[Tensor, " p"]]:
    """Mean of a map's slices over all views, and their variance about it, shell by shell."""
    views = so3_grid(VIEWS).to(reference.transform.device)
    slices = templates(reference.transform, views, pixels, reference.scale)
    shells, weight = pixels.box_size, pixels.weight  # more than there are: the largest is known to the device alone

    def by_shell(values: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        total = torch.zeros(2, shells, device=values.device)
        total.index_add_(1, pixels.shell, torch.stack([values * weight, weight]))
        return (total[0] / total[1].clamp_min(1e-30))[pixels.shell]

    mean = by_shell(slices.real.mean(0)).to(slices.dtype)  # real: the opposite view has the conjugate
    return mean, by_shell((slices - mean).abs().square().mean(0))
