"""Poses refined with the model of variety: the true ones, where the mean alone is misled by what moves."""

from dataclasses import replace

import torch

from scalecryo.map.backprojection import PADDING
from scalecryo.map.components import Latents
from scalecryo.map.reference import reference_transform
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.mask import soft_sphere
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle, random_rotations, rotation_from_vector
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.state_poses import refine_with_states
from scalecryo.train.state_search import StateSearch, places_of
from tests.support.blobs import blobs

BOX, COUNT, NOISE = 24, 24, 1e-3


def test_the_true_poses_are_found_where_the_state_is_known_only_by_the_image() -> None:
    rng, pixels = torch.Generator().manual_seed(4), fourier_pixels(BOX, 10.0)
    mean, component = blobs(BOX, 1, count=6), 0.7 * blobs(BOX, 2, count=4) * soft_sphere(BOX, 8)
    model = ComponentModel(torch.stack([mean, mean]), soft_sphere(BOX, 10), 1)
    model.components = torch.stack([component[None], component[None]])
    model.noise = torch.full_like(model.noise, NOISE**2)
    model.begin(pixels)
    rotation, z = random_rotations(COUNT, rng), torch.randn(COUNT, generator=rng)
    shift = 0.5 * torch.randn(COUNT, 2, generator=rng)
    centred = torch.zeros(COUNT, len(pixels), dtype=torch.complex64)
    for volume, factor in ((mean, torch.ones(COUNT)), (component, z)):
        transform = reference_transform(volume, PADDING)
        slices = fourier_slice(transform, rotation, None, None, pixels.kx, pixels.ky, PADDING, BOX)
        centred += factor[:, None] * slices
    transforms = centred * shift_ramp(shift, pixels.kx, pixels.ky, BOX)
    half = torch.arange(COUNT) % 2 + 1
    images = ParticleImages(torch.arange(COUNT), half, torch.ones(COUNT), half * 0, pixels, 1.0)
    images.__dict__.update(transforms=transforms, ctf=None)
    off = rotation @ rotation_from_vector(0.04 * torch.randn(COUNT, 3, generator=rng))
    start = replace(PoseEstimates.unknown(COUNT), rotation=off, shift=torch.zeros(COUNT, 2))
    posed = PosedImages(images, start, transforms, torch.ones(COUNT, len(pixels)), torch.ones(COUNT)).at(
        off, start.shift
    )
    before = geodesic_angle(off, rotation)
    found, _ = refine_with_states(model, posed, fit_shift=True, steps=8)
    after = geodesic_angle(found.rotation, rotation)
    # Derivatives are differences over a quarter of a pixel: steps shrink the error by some factor, not quadratically.
    assert float(after.median()) < 0.05
    assert float(after.quantile(0.9)) < 0.1 * float(before.quantile(0.9))
    assert float((found.poses.shift - shift).norm(dim=1).median()) < 0.01
    latents: Latents = model.expect(found).latents
    assert float((latents.mean[:, 0] - z).abs().median()) < 0.02
    # Without the component the same steps end where the state misleads them.
    model.components = 1e-6 * model.components
    model.begin(pixels)
    misled = geodesic_angle(refine_with_states(model, posed, fit_shift=True, steps=8)[0].rotation, rotation)
    assert float(misled.median()) > 5 * float(after.median())


def test_shifts_that_are_known_stay() -> None:
    pixels = fourier_pixels(BOX, 6.0)
    volume = blobs(BOX, 1)
    model = ComponentModel(torch.stack([volume, volume]), soft_sphere(BOX, 10), 1)
    model.components = 0.1 * torch.stack([blobs(BOX, 2)[None]] * 2)
    model.begin(pixels)
    rng = torch.Generator().manual_seed(1)
    transforms = torch.view_as_complex(torch.randn(3, len(pixels), 2, generator=rng))
    one = torch.ones(3)
    images = ParticleImages(torch.arange(3), torch.tensor([1, 2, 1]), one, torch.zeros(3).long(), pixels, 2.0)
    images.__dict__.update(transforms=transforms, ctf=None)
    start = replace(PoseEstimates.unknown(3), rotation=random_rotations(3, rng), shift=torch.ones(3, 2))
    posed = PosedImages(images, start, transforms, torch.ones(3, len(pixels)), one).at(start.rotation, start.shift)
    found, cost = refine_with_states(model, posed, fit_shift=False)
    torch.testing.assert_close(refine_with_states(model, found, fit_shift=False, steps=0)[1], cost)
    torch.testing.assert_close(found.poses.shift, start.shift)
    assert bool((geodesic_angle(found.rotation, start.rotation) > 0).any())


def test_a_search_over_states_finds_poses_far_from_the_present_ones() -> None:
    """Noise-free images in states ± 1.5, started 60° off: the search over both states' maps brings them home."""
    rng, pixels, count = torch.Generator().manual_seed(6), fourier_pixels(BOX, 10.0), 12
    mean, component = blobs(BOX, 1, count=6), 0.7 * blobs(BOX, 2, count=4) * soft_sphere(BOX, 8)
    model = ComponentModel(torch.stack([mean, mean]), soft_sphere(BOX, 10), 1)
    model.components = torch.stack([component[None], component[None]])
    model.noise = torch.full_like(model.noise, 1e-2**2)
    model.begin(pixels)
    rotation, z = random_rotations(count, rng), torch.tensor([-1.5, 1.5]).repeat(count // 2)
    slices = [
        fourier_slice(reference_transform(volume, PADDING), rotation, None, None, pixels.kx, pixels.ky, PADDING, BOX)
        for volume in (mean, component)
    ]
    transforms = slices[0] + z[:, None] * slices[1]
    half = torch.arange(count) // 2 % 2 + 1
    images = ParticleImages(torch.arange(count), half, torch.ones(count), half * 0, pixels, 1.0)
    images.__dict__.update(transforms=transforms, ctf=None)
    away = rotation @ rotation_from_vector(torch.tensor([1.0, 0.3, 0.0]).expand(count, 3))
    start = replace(PoseEstimates.unknown(count), rotation=away, shift=torch.zeros(count, 2))
    flat = torch.ones(count, len(pixels))
    posed = PosedImages(images, start, transforms, flat, torch.ones(count)).at(away, start.shift)
    search = StateSearch(model, torch.tensor([[-1.5], [1.5]]), pixels, 3, fit_shift=True)
    found = search.refined(posed)
    error = geodesic_angle(found.rotation, rotation)
    # A grid of 15° reaches the basin of nearly every image; local refinement does the rest.
    assert float((error < 3).float().mean()) > 0.8
    before, after = (refine_with_states(model, one, fit_shift=True, steps=0)[1] for one in (posed, found))
    assert bool((after <= before).all())


def test_places_are_the_means_of_separate_clusters() -> None:
    rng = torch.Generator().manual_seed(2)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = torch.cat([centre + 0.1 * torch.randn(50, 2, generator=rng) for centre in centres])
    found = places_of(points, 3)
    expected = torch.stack([points[k * 50 : (k + 1) * 50].mean(0) for k in range(3)])
    torch.testing.assert_close(found, expected)
