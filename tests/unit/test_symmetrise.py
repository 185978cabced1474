"""Symmetrised sums: the same as inserting every image at all of its symmetry-related poses."""

import pytest
import torch

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics import symmetrise
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import add_friedel_pairs, extract_slices, gridding_correction
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.kernels.cpu_symmetrise import add_copies_cpu
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.symmetry import PointGroup

BOX, COUNT = 32, 120


def _sums(group: PointGroup, classes: int = 1, radius: float = BOX / 2 - 1) -> tuple[Backprojection, Backprojection]:
    """Noisy images of ten blobs, with a CTF-like power: inserted once, and at all related poses."""
    generator = torch.Generator().manual_seed(4)
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    voxel = torch.stack([x, y, z], -1).float()
    place = 9 * (2 * torch.rand(10, 3, generator=generator) - 1)
    copies = (place @ group.rotations.mT).flatten(0, 1)
    density = sum((-(voxel - at).square().sum(-1) / 3).exp() for at in copies)
    pixels = fourier_pixels(BOX, radius)
    rotation = random_rotations(COUNT, generator)
    transform = rfft3_centred(density * gridding_correction(BOX, 2.0), 2 * BOX)
    images = extract_slices(transform, rotation, pixels.kx, pixels.ky, 2.0)
    noise = torch.randn(images.shape, dtype=torch.complex64, generator=generator)
    power = 0.1 + torch.rand(COUNT, len(pixels), generator=generator)
    weighted = CtfWeightedImages(power * (images + 0.1 * images.abs().mean() * noise), power)
    shift, weight, half = torch.zeros(COUNT, 2), torch.ones(COUNT), 1 + torch.arange(COUNT) % 2
    once, everywhere = Backprojection(BOX, classes=classes), Backprojection(BOX, classes=classes)
    index = torch.arange(COUNT) // 2 % classes
    once.add(weighted, rotation, shift, weight, half, pixels, index)
    for turn in group.rotations:
        everywhere.add(weighted, turn @ rotation, shift, weight, half, pixels, index)
    once.symmetrise(group.others, pixels.radius_limit)
    return once, everywhere


@pytest.mark.parametrize("name", ["C4", "D2", "O"])
def test_turns_that_keep_the_grid_are_exact(name: str) -> None:
    """Closed form: these turns take grid points to grid points, so nothing is interpolated; single precision."""
    once, everywhere = _sums(PointGroup.of(name), radius=12.0)
    for ours, theirs in zip(once.tensors(), everywhere.tensors(), strict=True):
        ours, theirs = (add_friedel_pairs(sums[0, 1].clone()) for sums in (ours, theirs))
        assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("name", ["C3", "T", "I"])
def test_other_turns_are_trilinear(name: str) -> None:
    axis = (torch.arange(BOX) - BOX // 2).square()
    radius = (axis[:, None, None] + axis[:, None] + axis).sqrt()
    inner, outer = radius < 7, (radius > 9) & (radius < 13)
    once, everywhere = _sums(PointGroup.of(name))
    for half in (1, 2):
        ours, theirs = once.solve_one(half=half), everywhere.solve_one(half=half)
        # Where the blobs outweigh the noise, which two interpolations spread differently; measured 0.9982 at worst. A
        # wrong turn, or copies without their Friedel partners: below 0.9.
        assert float(fsc(ours, theirs)[1:12].min()) > 0.997
        # The second interpolation's fall towards the edge is undone: 5 to 8 % between these shells without.
        ratio = [float((ours * theirs)[shell].sum() / theirs.square()[shell].sum()) for shell in (inner, outer)]
        assert ratio[1] / ratio[0] == pytest.approx(1, abs=0.04)


def test_parts_are_merged_before_or_after() -> None:
    """Sums of parts made symmetric, then merged, are those of the whole: linear, to rounding."""
    group = PointGroup.of("C3")
    parts, _ = _sums(group, classes=2)
    whole, _ = _sums(group)
    merged = parts.merged([0, 1])
    assert torch.allclose(merged.numerator, whole.numerator, atol=1e-4 * float(whole.numerator.abs().max()))
    assert torch.allclose(merged.solve(), whole.solve(), atol=1e-3 * float(whole.solve().abs().max()))


def test_backends_agree() -> None:
    generator = torch.Generator().manual_seed(6)
    shape = (2, BOX, BOX, BOX // 2 + 1)
    values = torch.randn(shape, dtype=torch.complex64, generator=generator)
    powers = torch.rand(shape, generator=generator)
    for sums in (*values, *powers):
        add_friedel_pairs(sums)
    turns = PointGroup.of("T").others
    ours = add_copies_cpu(values, powers, turns, 15.0)
    reference = symmetrise._by_slices(values, powers, turns, 15.0)
    for one, other in zip(ours, reference, strict=True):
        assert float((one - other).abs().max()) < 1e-4
