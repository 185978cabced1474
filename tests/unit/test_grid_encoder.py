"""The grid encoder and its training: shapes of truth, and that training brings it to the poses."""

import math

import torch

from scalecryo.distributed.world import World
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference
from scalecryo.model.grid_encoder import GridEncoder, GridPrediction, encoder_features
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.rotation import geodesic_angle, random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import templates, with_flips
from scalecryo.train.encoder_training import EncoderTrainer, TrainingBatch


def blobs(box_size: int, generator: torch.Generator) -> torch.Tensor:
    """A map of twelve Gaussian blobs without symmetry."""
    line = torch.arange(box_size) - box_size // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(box_size, box_size, box_size)
    for centre in torch.randn((12, 3), generator=generator) * box_size / 8:
        squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume += torch.exp(-squared / (2 * 1.5**2))
    return volume


def test_own_rotation_of_a_sure_encoder_is_the_grid_point() -> None:
    grid = with_flips(so3_grid(500))
    encoder = GridEncoder(grid, 10, 16, 1.0)
    logits = torch.full((7, len(grid)), -20.0)
    best = torch.arange(7) * 100
    logits[torch.arange(7), best] = 20.0
    rotation = encoder.own_rotation(GridPrediction(logits, torch.zeros(7, 2)))
    assert geodesic_angle(rotation, grid[best]).max() < 0.1  # single precision: arc cosine near 1
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(7), atol=1e-5)


def test_own_rotation_has_a_finite_gradient() -> None:
    grid = with_flips(so3_grid(200))
    encoder = GridEncoder(grid, 10, 16, 1.0)
    logits = torch.randn((5, len(grid)), generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoder.own_rotation(GridPrediction(logits, torch.zeros(5, 2))).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_candidates_are_the_likeliest_with_their_probability() -> None:
    grid = with_flips(so3_grid(100))
    encoder = GridEncoder(grid, 10, 16, 1.0)
    logits = torch.randn((3, len(grid)), generator=torch.Generator().manual_seed(1))
    found = encoder.candidates(GridPrediction(logits, torch.ones(3, 2)), 5, 3.0)
    assert found.rotation.shape == (3, 5, 3, 3)
    expected = logits.softmax(1).sort(1, descending=True).values[:, :5]
    assert torch.allclose(found.log_weight.exp(), expected)
    assert (found.shift == 3).all()  # one pixel of 3 Å


def test_features_do_not_depend_on_the_scale_of_an_image() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn((4, 30), dtype=torch.complex64, generator=generator)
    weight = torch.rand(30, generator=generator)
    assert torch.allclose(encoder_features(images, None, weight), encoder_features(7 * images, None, weight), atol=1e-5)


def test_training_batches_are_at_the_encoders_scale() -> None:
    # Levels keep the noise: unscaled transforms differ by the ratio of the boxes.
    small, large = fourier_pixels(32, 12), fourier_pixels(64, 20)
    transforms = torch.randn((6, len(large)), dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    index = torch.arange(6)
    images = ParticleImages(index, 1 + index % 2, torch.ones(6), index * 0, large, 2.0).with_transforms(transforms)
    poses = Poses(torch.eye(3).expand(6, 3, 3), torch.full((6, 2), 8.0))
    batch = TrainingBatch.of(images, poses, small, 6, 0)
    assert torch.equal(large.kx[: len(small)], small.kx)
    assert torch.equal(large.ky[: len(small)], small.ky)
    order = [0, 2, 4, 1, 3, 5]  # one half behind the other
    assert torch.allclose(batch.transforms, transforms[order, : len(small)] / 2)
    assert torch.equal(batch.poses.shift_px(4.0), poses.shift_px(2.0) / 2)


def test_one_image_is_enough_for_every_step_of_a_batch() -> None:
    # At the end of an epoch a worker may have one image, and all workers step together.
    pixels = fourier_pixels(32, 12)
    index = torch.zeros(1, dtype=torch.long)
    images = ParticleImages(index, index + 1, torch.ones(1), index, pixels, 2.0).with_transforms(
        torch.ones((1, len(pixels)), dtype=torch.complex64)
    )
    poses = Poses(torch.eye(3)[None], torch.zeros(1, 2))
    for number in range(3):
        assert len(TrainingBatch.of(images, poses, pixels, 6, number).transforms) == 1


def test_training_brings_the_encoder_to_the_poses() -> None:
    # Reference: the poses that the images were made with. A grid of 1,152 rotations lies 23.5° apart ((8π²/n)^(1/3));
    # an untrained encoder errs by 126.5° on average (the mean angle of a uniform rotation, π/2 + 2/π), a trained one
    # must be within the grid's spacing for half of the images.
    generator = torch.Generator().manual_seed(4)
    box_size, radius = 32, 8
    pixels = fourier_pixels(box_size, radius)
    transform = rfft3_centred(blobs(box_size, generator), 2 * box_size)
    rotation = random_rotations(6000, generator)
    clean = templates(transform, rotation, pixels, 2.0)
    sigma = clean[:, 1:].abs().square().mean().sqrt()  # without the mean, which carries no pose
    noise = torch.randn(clean.shape, dtype=torch.complex64, generator=generator) * sigma
    spectrum = NoiseSpectrum(int(pixels.shell.max()) + 1)
    spectrum.add(noise[:500], None, pixels)
    reference = Reference(transform, 2.0, spectrum)
    torch.manual_seed(0)
    encoder = GridEncoder(with_flips(so3_grid(576)), len(pixels), 256, 1.0)
    trainer = EncoderTrainer(
        encoder, pixels, 3.0, rate=1e-3, shift_sigma_px=0.0, world=World(), reduce_dtype="float32", seed=0
    )
    images, zero = clean + noise, torch.zeros(6000, 2)
    for start in 12 * list(range(0, 5500, 110)):
        rows = slice(start, start + 110)
        trainer.train_step(TrainingBatch(images[rows], None, Poses(rotation[rows], zero[rows])), reference)
    held = slice(5500, None)
    with torch.no_grad():
        prediction = encoder(encoder_features(images[held], None, spectrum.pixel_weight(pixels)))
    error = geodesic_angle(encoder.own_rotation(prediction), rotation[held]).median()
    assert error < math.degrees((8 * math.pi**2 / 1152) ** (1 / 3))


def test_training_resumes_exactly() -> None:
    pixels = fourier_pixels(32, 6)
    generator = torch.Generator().manual_seed(5)
    transform = rfft3_centred(blobs(32, generator), 64)
    spectrum = NoiseSpectrum(8)
    images = torch.randn((40, len(pixels)), dtype=torch.complex64, generator=generator)
    spectrum.add(images, None, pixels)
    reference = Reference(transform, 2.0, spectrum)
    batch = TrainingBatch(images, None, Poses(random_rotations(40, generator), torch.zeros(40, 2)))

    def fresh() -> EncoderTrainer:
        torch.manual_seed(1)
        return EncoderTrainer(GridEncoder(so3_grid(50), len(pixels), 16, 1.0), pixels, 3.0, rate=1e-3,
                       shift_sigma_px=1.0, world=World(), reduce_dtype="float32", seed=7)  # fmt: skip

    first, second = fresh(), fresh()
    first.train_step(batch, reference)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.train_step(batch, reference), second.train_step(batch, reference))
