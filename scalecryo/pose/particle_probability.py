"""Whether an image shows the particle at all, or nothing, or something else.

Bayes at even odds, between three explanations. The particle: its evidence is the mean of exp(gain) over all poses,
where a pose's gain is its log-likelihood ratio over an empty image. Nothing: 1. Something else, as large and as bright:
a random density within a disc of the particle's diameter, with the mean and the spectrum that the particle's slices
have over all views. Noise fits one of so many poses by chance, and no better; another object fits some pose better than
noise, but not as well as it would fit itself.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.map.reference import Reference
from scalecryo.physics.fft import FourierPixels, fourier_pixels, irfft2_centred, rfft2_centred
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


def particle_probability(
    images: ParticleImages, found: Poses, reference: Reference, radius: float, shift_radius: float
) -> Float[Tensor, " b"]:
    """Probability that an image shows the particle.

    The likeliest pose alone brings exp(gain) over the number of poses that can be told apart at the radius. Where
    images say little, many others bring as much together: by the spread of their gains, as in the random-energy model
    (Derrida 1981), all poses together fall behind a random density by (√g - √log n)², where n poses gain g nats over
    the mean view if they are right, and not at all where g < log n: nothing can tell them apart then.

    Args:
        images: with the poses found for them.
        found: those poses.
        reference: that they were found against.
        radius: Fourier pixels that are compared. A low one: an image's own share in the map would speak for it.
        shift_radius: of the disc of possible shifts, Å; 0 where particles are centred.
    """
    near = images.within(radius)
    weight, limit = reference.noise.pixel_weight(near.pixels), near.pixels.radius_limit
    poses = 8 * math.pi**2 * limit**3
    if shift_radius > 0:
        poses *= max(1.0, math.pi * (shift_radius / images.pixel_size * 2 * math.pi * limit / images.box_size) ** 2)
    mean, variance = _slice_moments(reference, near.pixels)
    predicted, expected = _predicted(near, found, reference), _formed(mean.expand(len(near), -1), near, found)
    empty = empty_cost(near.transforms, weight)
    gain = empty - empty_cost(near.transforms - predicted, weight)
    left = near.with_transforms(near.transforms - expected)
    other = empty - empty_cost(left.transforms, weight)
    other = other + _random_evidence(left, found, variance, reference.diameter, weight)
    behind = (empty_cost(predicted - expected, weight).sqrt() - math.log(poses) ** 0.5).clamp_min(0).square()
    particle = torch.logaddexp(gain - math.log(poses), other - behind)
    return torch.sigmoid(particle - torch.logaddexp(torch.zeros_like(other), other)).float()


def pose_gain(images: ParticleImages, found: Poses, reference: Reference, radius: float) -> Float[Tensor, " b"]:
    """Log-likelihood ratio of poses over an empty map, at a radius, Fourier pixels."""
    near = images.within(radius)
    weight = reference.noise.pixel_weight(near.pixels)
    left = near.transforms - _predicted(near, found, reference)
    return empty_cost(near.transforms, weight) - empty_cost(left, weight)


def _predicted(near: ParticleImages, found: Poses, reference: Reference) -> Complex[Tensor, "b p"]:
    return _formed(templates(reference.transform, found.rotation, near.pixels, reference.scale), near, found)


def _formed(slices: Complex[Tensor, "b p"], near: ParticleImages, found: Poses) -> Complex[Tensor, "b p"]:
    pixels = near.pixels
    return form_images(slices, near.ctf, found.shift_px(near.pixel_size), pixels.kx, pixels.ky, pixels.box_size)


def _random_evidence(
    images: ParticleImages, found: Poses, variance: Float[Tensor, " p"], diameter: float, weight: Float[Tensor, " p"]
) -> Float[Tensor, " b"]:
    """Log-evidence over an empty image of a random density without mean, in a disc at the shifts found.

    The image is filtered by its CTF and cut to the disc, which covers a share f of the box: of the Fourier pixels f are
    independent then, the noise has f of its variance, and the signal all of it. For CTF² stands its mean over the
    pixels that the cut mixes. Each pixel is a complex Gaussian.
    """
    pixels = images.pixels
    noise = weight / pixels.weight  # 1 / variance of the noise
    ctf = torch.ones_like(images.transforms.real) if images.ctf is None else images.ctf
    back = shift_ramp(-found.shift_px(images.pixel_size), pixels.kx, pixels.ky, pixels.box_size)
    small = fourier_pixels(2 * math.ceil(pixels.radius_limit) + 2, pixels.radius_limit).to(ctf.device)
    disc = soft_disc(small.box_size, diameter * small.box_size / 2, EDGE_PX, device=ctf.device)
    share = disc.square().mean()

    def cut(values: Complex[Tensor, "b p"], window: Float[Tensor, "n n"]) -> Complex[Tensor, "b p"]:
        return small.pack(rfft2_centred(irfft2_centred(small.unpack(values), small.box_size) * window))

    seen = cut(images.transforms * back * ctf * noise.sqrt(), disc)
    mixing = irfft2_centred(rfft2_centred(disc).abs().square().to(seen.dtype), small.box_size)
    power = cut(ctf.square().to(seen.dtype), mixing / mixing.amax()).real.clamp_min(LEAST_POWER)
    ratio = power * variance * noise / share
    each = seen.abs().square() / power * (ratio / (1 + ratio)) - share * ratio.log1p()
    return 0.5 * (pixels.weight * each).double().sum(-1)


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
