"""The E-step against the poses, halves and classes that images were made with."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scalecryo.distributed.timer import Timer
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fft import FourierPixels, fourier_pixels
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle, random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_refinement import MODE_DEG, SHARPNESS
from scalecryo.pose.candidate_sources import SearchSource
from scalecryo.pose.estimator import EStepPlan, PoseEstimator
from scalecryo.pose.particle_probability import pose_gain
from scalecryo.pose.search import shift_grid, templates

BOX, PIXEL_SIZE, COUNT, SIGMA = 32, 3.0, 48, 0.5


def blobs(seed: int) -> Tensor:
    """A map of twelve Gaussian blobs without symmetry."""
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(BOX, BOX, BOX)
    for centre in torch.randn((12, 3), generator=torch.Generator().manual_seed(seed)) * BOX / 8:
        squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume += torch.exp(-squared / (2 * 1.5**2))
    return volume


def references(classes: int) -> ReferenceSet:
    """Noise-free half-maps: both halves of a class are one map."""
    maps = torch.stack([torch.stack([blobs(number)] * 2) for number in range(classes)])
    return ReferenceSet.of_maps(maps, PIXEL_SIZE, noise=torch.full((BOX // 2 + 1,), SIGMA**2), radius=12.0)


def particles(known: ReferenceSet, pixels: FourierPixels) -> tuple[ParticleImages, PoseEstimates]:
    """Images of the references at random poses, shifted, with white noise of the spectrum that the references name."""
    generator = torch.Generator().manual_seed(7)
    rotation, rows = random_rotations(COUNT, generator), torch.arange(COUNT)
    shift_px = torch.rand(COUNT, 2, generator=generator) * 3 - 1.5
    class_index, half, one = rows % known.classes, 1 + rows // 2 % 2, torch.ones(COUNT)
    prepared = known.at(BOX, pixels)
    slices = torch.zeros(COUNT, len(pixels), dtype=torch.complex64)
    for number in range(known.classes):
        own = class_index == number
        slices[own] = templates(prepared[number, 1].transform, rotation[own], pixels, prepared[number, 1].scale)
    images = form_images(slices, None, shift_px, pixels.kx, pixels.ky, BOX)
    images += torch.randn(images.shape, dtype=torch.complex64, generator=generator) * BOX * SIGMA
    truth = PoseEstimates(rotation, shift_px * PIXEL_SIZE, class_index, one, one, one, one)
    return ParticleImages(rows, half, one, rows * 0, pixels, PIXEL_SIZE).with_transforms(images), truth


def estimator(
    known: ReferenceSet,
    pixels: FourierPixels,
    *,
    search_known: bool,
    everywhere: bool = False,
    modes: int = 1,
    shift_sigma: float | None = None,
    equivalent: tuple[Tensor, ...] = (),
    labels_stay: bool = False,
) -> PoseEstimator:
    shifts, turns = shift_grid(2.0, 1.0), torch.Generator().manual_seed(0)
    source = SearchSource(so3_grid(1152), 10.0, shifts, 3, turns, everywhere=everywhere, shift_sigma=shift_sigma)
    plan = EStepPlan(12.0, 2, search_known, ((8.0, 3), (12.0, 2)), probability_radius=10.0, shift_radius=6.0,
                     modes=modes, shift_sigma=shift_sigma, equivalent=equivalent, labels_stay=labels_stay)  # fmt: skip
    return PoseEstimator(known.at(BOX, pixels), plan, source, Timer())


@pytest.mark.parametrize("classes", [1, 2])
def test_unknown_poses_and_classes_are_found(classes: int) -> None:
    # Reference: what the images were made with. At 12 Fourier pixels of 32 px a turn of 60/12 = 5° moves the outermost
    # pixel by one; at this noise local refinement is good to a small part of that, and of a pixel.
    pixels, known = fourier_pixels(BOX, 13.0), references(classes)
    images, truth = particles(known, pixels)
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    found = estimator(known, pixels, search_known=False).estimate(images, nothing, seen)
    assert geodesic_angle(found.rotation, truth.rotation).median() < 2.0
    assert (found.shift - truth.shift).norm(dim=1).median() < 0.2 * PIXEL_SIZE
    assert float((found.class_index == truth.class_index).float().mean()) > 0.95
    assert found.particle_probability.median() > 0.99
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


def test_a_known_pose_is_refined_and_kept_in_its_half() -> None:
    # Poses turned by 3° come back; a search beside them finds no better one; each half is posed against its own map:
    # with the second half's map replaced by another, only the second half's likelihood falls.
    pixels, known = fourier_pixels(BOX, 13.0), references(1)
    images, truth = particles(known, pixels)
    angle = torch.tensor(3.0).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0], [0.0, 0.0, 1.0]])
    start = PoseEstimates(truth.rotation @ turn, truth.shift, truth.class_index, *4 * [torch.ones(COUNT)])
    seen = torch.ones(COUNT, dtype=torch.bool)
    alone, beside = (
        estimator(known, pixels, search_known=search).estimate(images, start, seen) for search in (False, True)
    )
    assert geodesic_angle(alone.rotation, truth.rotation).median() < 1.0
    assert geodesic_angle(beside.rotation, alone.rotation).median() < 0.5
    other = ReferenceSet.of_maps(
        torch.stack([torch.stack([blobs(0), blobs(5)])]), PIXEL_SIZE, noise=known.noise, radius=12.0,
        mask=known.mask,
    )  # fmt: skip
    wrong = estimator(other, pixels, search_known=False).estimate(images, start, seen)
    fell = (wrong.log_likelihood < alone.log_likelihood - 20).float()
    assert fell[images.half == 2].mean() > 0.9


def test_an_image_is_judged_by_the_other_halfs_map() -> None:
    # Images of another object that their own half's map shows, as it shows junk where views are rare, and the other
    # half's does not. Reference: a map that shows it in both halves says that each is a particle.
    pixels, known = fourier_pixels(BOX, 13.0), references(1)
    shows = replace(known, maps=torch.stack([blobs(5), blobs(5)])[None])
    images, truth = particles(shows, pixels)
    alone = replace(known, maps=torch.stack([blobs(5), blobs(0)])[None])
    seen, first = torch.ones(COUNT, dtype=torch.bool), images.half == 1
    both, one = (estimator(own, pixels, search_known=False).estimate(images, truth, seen) for own in (shows, alone))
    assert both.particle_probability.min() > 0.9
    assert geodesic_angle(one.rotation, truth.rotation)[first].median() < 1.0
    assert one.particle_probability[first].max() < 0.1


def test_a_pose_far_from_the_known_shift_is_found_by_a_search_everywhere() -> None:
    # Known poses turned by 90°, at shifts 2.5 px off: three candidates at such a shift miss the true pose of many
    # images, three among all shifts do not. Reference: what the images were made with.
    pixels, known = fourier_pixels(BOX, 13.0), references(1)
    images, truth = particles(known, pixels)
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    away = truth.shift + torch.tensor([2.5, 0.0]) * PIXEL_SIZE
    start = replace(truth, rotation=quarter @ truth.rotation, shift=away)
    seen = torch.ones(COUNT, dtype=torch.bool)
    right = []
    for everywhere in (False, True):
        posed = estimator(known, pixels, search_known=True, everywhere=everywhere)
        found = posed.estimate(images, start, seen)
        right.append(float((geodesic_angle(found.rotation, truth.rotation) < 5).float().mean()))
    assert right[1] > 0.95
    assert right[1] > right[0]


def with_noise(images: ParticleImages, sigma: float) -> ParticleImages:
    noise = torch.randn(images.transforms.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(11))
    return images.with_transforms(images.transforms + noise * BOX * (sigma**2 - SIGMA**2) ** 0.5)


def test_modes_share_the_probability_as_their_likelihoods_do() -> None:
    # Reference: Bayes with even odds beforehand, from the likelihood that `pose_gain` gives each mode by itself. In
    # much noise several modes compete; together they are right more often than the best one says.
    pixels, sigma = fourier_pixels(BOX, 13.0), 4.0
    known = replace(references(1), noise=torch.full((BOX // 2 + 1,), sigma**2))
    images, truth = particles(references(1), pixels)
    images = with_noise(images, sigma)
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    posed = estimator(known, pixels, search_known=True, modes=4)
    modes = posed.estimate_modes(images, nothing, seen)
    assert len(modes) == 4
    prepared, gains = known.at(BOX, pixels), torch.full((COUNT, 4), -torch.inf)
    for half in (1, 2):
        at = images.rows_by_half[half - 1]
        for number, mode in enumerate(modes):
            gain = pose_gain(images.select(at), mode.select(at), prepared[0, half], 12.0).float()
            gains[at, number] = torch.where(mode.confidence[at] > 0, gain, -torch.inf)
    shares = torch.stack([mode.confidence for mode in modes], 1)
    # Costs are sums of thousands in single precision.
    assert torch.allclose(shares, (gains / SHARPNESS).softmax(1), atol=2e-3)
    assert (shares[:, :-1] >= shares[:, 1:]).all()
    for first in range(4):
        for second in range(first):
            apart = geodesic_angle(modes[first].rotation, modes[second].rotation) > MODE_DEG
            assert (apart | (modes[first].confidence == 0)).all()
    right = torch.stack([geodesic_angle(mode.rotation, truth.rotation) < 15 for mode in modes], 1)
    assert 0.3 < float(right[:, 0].float().mean()) < float(right.any(1).float().mean())


def test_modes_far_from_the_centre_are_less_likely_where_shifts_are_known_to_be_small() -> None:
    # Reference: the same Bayes with a Gaussian prior of shifts. It is right: images are shifted by 0.87 px along each
    # axis. More poses are right with it.
    pixels, sigma, spread = fourier_pixels(BOX, 13.0), 5.0, 0.87 * PIXEL_SIZE
    known = replace(references(1), noise=torch.full((BOX // 2 + 1,), sigma**2))
    images, truth = particles(references(1), pixels)
    images = with_noise(images, sigma)
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    prepared, right = known.at(BOX, pixels), []
    for prior in (None, spread):
        posed = estimator(known, pixels, search_known=True, modes=4, shift_sigma=prior)
        modes = posed.estimate_modes(images, nothing, seen)
        right.append(float((geodesic_angle(modes[0].rotation, truth.rotation) < 15).float().mean()))
    score = torch.full((COUNT, 4), -torch.inf)
    for half in (1, 2):
        at = images.rows_by_half[half - 1]
        for number, mode in enumerate(modes):
            gain = pose_gain(images.select(at), mode.select(at), prepared[0, half], 12.0).float()
            gain -= (mode.shift[at] / spread).square().sum(1) / 2
            score[at, number] = torch.where(mode.confidence[at] > 0, gain, -torch.inf)
    shares = torch.stack([mode.confidence for mode in modes], 1)
    assert torch.allclose(shares, (score / SHARPNESS).softmax(1), atol=2e-3)
    assert right[1] > right[0]


def test_the_first_mode_is_the_pose_that_is_found() -> None:
    pixels, known = fourier_pixels(BOX, 13.0), references(1)
    images, _ = particles(known, pixels)
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    one = estimator(known, pixels, search_known=True).estimate(images, nothing, seen)
    first, *others = estimator(known, pixels, search_known=True, modes=3).estimate_modes(images, nothing, seen)
    assert geodesic_angle(first.rotation, one.rotation).max() < 0.5  # `estimate` goes on from there
    assert first.confidence.median() > 0.999
    assert max(float(mode.confidence.median()) for mode in others) < 1e-3
    assert first.particle_probability.median() > 0.99


def test_noise_is_no_particle() -> None:
    pixels, known = fourier_pixels(BOX, 13.0), references(1)
    images, _ = particles(known, pixels)
    noise = (
        torch.randn(COUNT, len(pixels), dtype=torch.complex64, generator=torch.Generator().manual_seed(3)) * BOX * SIGMA
    )
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    found = estimator(known, pixels, search_known=False).estimate(images.with_transforms(noise), nothing, seen)
    assert found.particle_probability.median() < 0.01


def test_a_wrong_class_is_left_unless_it_was_sure() -> None:
    # Every particle comes with the pose of its own map but half of them with the other class: they go back, but for
    # those whose class was certain, where the others are not looked at.
    pixels, known = fourier_pixels(BOX, 13.0), references(2)
    images, truth = particles(known, pixels)
    seen, wrong = torch.ones(COUNT, dtype=torch.bool), torch.arange(COUNT) % 4 >= 2
    mixed = torch.where(wrong, 1 - truth.class_index, truth.class_index)
    posed = estimator(known, pixels, search_known=False)
    unsure = replace(truth, class_index=mixed, class_probability=torch.full((COUNT,), 0.6))
    found = posed.estimate(images, unsure, seen)
    assert float((found.class_index == truth.class_index).float().mean()) > 0.95
    assert float(found.class_probability[~wrong].median()) > 0.999
    sure = posed.estimate(images, replace(unsure, class_probability=torch.ones(COUNT)), seen)
    assert torch.equal(sure.class_index, mixed)
    again = posed.estimate(images, replace(unsure, class_probability=torch.ones(COUNT)), seen, all_classes=True)
    assert torch.equal(again.class_index, found.class_index)


def test_labels_that_stay_are_not_asked_again() -> None:
    # Wrong classes, of which nobody is sure, stay with their probability; a particle never seen gets the class that it
    # was made of.
    pixels, known = fourier_pixels(BOX, 13.0), references(2)
    images, truth = particles(known, pixels)
    seen = torch.arange(COUNT) % 2 > 0
    wrong = replace(truth, class_index=1 - truth.class_index, class_probability=torch.full((COUNT,), 0.6))
    posed = estimator(known, pixels, search_known=False, labels_stay=True)
    found = posed.estimate(images, wrong, seen)
    assert torch.equal(found.class_index[seen], wrong.class_index[seen])
    assert torch.allclose(found.class_probability[seen], torch.tensor(0.6))
    assert float(found.confidence[seen].max()) < 0.6 + 1e-6
    assert float((found.class_index == truth.class_index)[~seen].float().mean()) > 0.95


def test_poses_that_a_class_does_not_tell_apart_are_no_rivals() -> None:
    # The second class has a two-fold axis along z: each of its particles has two poses, equally likely. Reference: the
    # confidence, a pose's share of the probability, is then one half, and one where the two count as the same.
    pixels, known = fourier_pixels(BOX, 13.0), references(2)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    maps = known.maps.clone()
    maps[1] += maps[1].flip(-1, -2).roll((1, 1), (-1, -2))  # about the centre, box / 2
    known = ReferenceSet.of_maps(maps, PIXEL_SIZE, noise=known.noise, radius=12.0)
    images, truth = particles(known, pixels)
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    confidence = {}
    for equivalent in ((), (torch.zeros(0, 3, 3), half_turn[None])):
        posed = estimator(known, pixels, search_known=True, equivalent=equivalent)
        found = posed.estimate(images, nothing, seen)
        assert torch.equal(found.class_index, truth.class_index)
        confidence[len(equivalent)] = [found.confidence[truth.class_index == number] for number in (0, 1)]
    assert torch.equal(confidence[0][0], confidence[2][0])
    assert float(confidence[0][1].median()) == pytest.approx(0.5, abs=0.15)  # by what is left of the noise
    assert float(confidence[2][1].min()) > 0.99
