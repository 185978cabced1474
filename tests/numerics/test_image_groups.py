"""Noise of optics groups and scales of micrographs, against closed forms of what was drawn."""

import pytest
import torch
from torch import Tensor

from scalecryo.map.image_groups import ImageGroups, relative_scales
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages

BOX = 32
PIXELS = fourier_pixels(BOX)
SHELLS = torch.arange(BOX // 2 + 2.0)
# White of power 4, and coloured below it: variances over the box of groups 1 and 3.
VARIANCE = {1: torch.full_like(SHELLS, 4.0), 3: 0.2 + 2 / (1 + (SHELLS / 4) ** 2)}


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    """Unscaled transforms of images whose noise over the box has unit variance."""
    packed = torch.randn(2, count, len(PIXELS), generator=generator)
    return torch.complex(packed[0], packed[1]) * (BOX / 2**0.5)


def particles(transforms: Tensor, group: Tensor, micrograph: Tensor, ctf: Tensor | None = None) -> ParticleImages:
    rows, ones = torch.arange(len(group)), torch.ones(len(group))
    bare = ParticleImages(rows, 1 + rows % 2, ones, group, PIXELS, 2.0, recorded_on=micrograph)
    return bare.with_transforms(transforms, ctf)


def noise(groups: Tensor, generator: torch.Generator) -> Tensor:
    sigma = torch.stack([VARIANCE[int(group)] for group in groups]).sqrt()[:, PIXELS.shell]
    return gaussian(len(groups), generator) * sigma


def learnt(counts: tuple[int, int], generator: torch.Generator) -> ImageGroups:
    """From residuals of so many images of either group."""
    group = torch.tensor([1] * counts[0] + [3] * counts[1])
    groups = ImageGroups(BOX, "cpu")
    images = particles(noise(group, generator), group, group * 0)
    groups.add_residuals(images.transforms, images)
    groups.update()
    return groups


def whitening(groups: ImageGroups, group: int) -> Tensor:
    """What the squared modulus of a group's images is multiplied by, by Fourier pixel."""
    one = particles(torch.ones(1, len(PIXELS)) + 0j, torch.tensor([group]), torch.tensor([0]))
    return groups.corrected(one).transforms.real[0].square()


def test_each_group_has_its_own_spectrum_and_both_become_the_common_one() -> None:
    groups = learnt((400, 400), torch.Generator().manual_seed(0))
    common = (VARIANCE[1] + VARIANCE[3])[PIXELS.shell] / 2
    near = PIXELS.shell >= 3
    for group in (1, 3):
        wanted = (common / VARIANCE[group][PIXELS.shell])[near]
        # 400 images of 9 independent coefficients and more in a shell: 1.7 %, and the same for the common spectrum; the
        # prior of 3 images draws by 3/403 of a ratio of up to 5.
        assert whitening(groups, group)[near] == pytest.approx(wanted, rel=0.08)


def test_a_small_group_is_drawn_to_the_common_spectrum() -> None:
    groups = learnt((400, 1), torch.Generator().manual_seed(1))
    # One image against the prior's three: 3/4 of the way from its own to the common spectrum, which is group 1's.
    high = PIXELS.shell == 14
    wanted = 4.0 / (0.75 * 4.0 + 0.25 * float(VARIANCE[3][14]))
    # 44 coefficients of the one image: 15 % of the quarter that is its own.
    assert float(whitening(groups, 3)[high].mean()) == pytest.approx(wanted, rel=0.05)


def test_spectra_are_of_images_before_their_correction() -> None:
    # Residuals of images that were whitened already give the same spectra again: a fixed point.
    generator = torch.Generator().manual_seed(2)
    groups, group = learnt((400, 400), generator), torch.tensor([1, 3]).repeat(400)
    before = whitening(groups, 3)
    images = groups.corrected(particles(noise(group, generator), group, group * 0))
    groups.add_residuals(images.transforms, images)
    groups.update()
    near = PIXELS.shell >= 3
    assert whitening(groups, 3)[near] == pytest.approx(before[near], rel=0.1)  # each of them has 2.4 %


def test_scales_of_micrographs_are_found_within_their_error() -> None:
    generator = torch.Generator().manual_seed(3)
    true = torch.exp(0.3 * torch.randn(200, generator=generator))
    micrograph = torch.arange(200).repeat_interleave(20)
    signal = gaussian(len(micrograph), generator) * 0.2
    weight = PIXELS.weight / BOX**2  # unit noise
    groups = ImageGroups(BOX, "cpu")
    for _ in range(2):  # the second time at the scales that were found
        observed = signal * true[micrograph, None] + gaussian(len(micrograph), generator)
        images = groups.corrected(particles(observed, micrograph * 0, micrograph))
        scale = torch.ones(len(micrograph), 1) if images.ctf is None else images.ctf[:, :1]
        groups.add_products(signal * scale, images, weight)
        predicted = groups.tensors()[-1][:200].clone()
        groups.update()
    one = particles(torch.ones(200, len(PIXELS)) + 0j, torch.arange(200) * 0, torch.arange(200))
    found = groups.corrected(one).ctf
    assert found is not None
    ratio = found[:, 0] / true
    # Relative to the median: one factor is free. The error of each is the root of 1 / Σ |P|².
    error = (ratio / ratio.median() - 1) * true * predicted.sqrt()
    assert float(error.square().mean()) == pytest.approx(1.0, abs=0.3)  # 200 of them: 3 standard errors


def test_scales_are_clipped() -> None:
    predicted = torch.full((100,), 1e4, dtype=torch.float64)
    product = predicted.clone()
    product[0], product[1] = 1e6, 1.0
    scale = relative_scales(product, predicted)
    assert scale is not None
    assert (float(scale[0]), float(scale[1])) == pytest.approx((5.0, 0.2))


def test_what_does_not_differ_is_not_touched() -> None:
    generator = torch.Generator().manual_seed(4)
    groups, group = ImageGroups(BOX, "cpu"), torch.full((400,), 2)
    signal = gaussian(400, generator) * 0.2
    images = particles(signal + gaussian(400, generator), group, torch.arange(400) // 10)
    groups.add_residuals(images.transforms - signal, images)
    groups.add_products(signal, images, PIXELS.weight / BOX**2)
    groups.update()
    assert groups.corrected(images) is images
    sums = ctf_weighted(images.transforms, None)
    assert groups.weighted(sums, images) is sums


def test_images_enter_maps_alike_before_and_after_the_correction() -> None:
    generator = torch.Generator().manual_seed(5)
    groups, group = learnt((300, 300), generator), torch.tensor([1, 3]).repeat(50)
    micrograph, ctf = torch.arange(100) // 5, torch.rand(100, len(PIXELS), generator=generator) - 0.5
    state = groups.state_dict() | {"scale": torch.linspace(0.5, 2.0, 20)}
    groups.load_state_dict(state)
    images = particles(noise(group, generator), group, micrograph, ctf)
    own = groups.corrected(images)
    wanted, found = ctf_weighted(own.transforms, own.ctf), groups.weighted(ctf_weighted(images.transforms, ctf), images)
    assert wanted.power is not None
    assert found.power is not None
    assert torch.allclose(found.values, wanted.values, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.power, wanted.power, rtol=1e-4, atol=1e-6)
    again = ImageGroups(BOX, "cpu")
    again.load_state_dict(groups.state_dict())
    assert torch.equal(again.corrected(images).transforms, own.transforms)
