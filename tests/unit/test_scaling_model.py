"""Bytes and times of tools/scaling_model.py against closed forms and against the real tensors."""

import math

import pytest
import torch

from scalecryo.config import config_from_dict
from scalecryo.map.backprojection import Backprojection
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.model.grid_encoder import GridEncoder
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import with_flips
from scalecryo.train import cost_model
from scalecryo.train.particle_state import SCHEMA
from scalecryo.train.recipes import ENCODER_RADIUS
from scalecryo.train.stages.schedule import plan_iteration
from scalecryo.train.stages.start_rounds import HALF_GRID
from tools import scaling_model as model


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("box", "channels", "hidden"), [(32, (32, 64, 128), 512), (64, (4, 8), 16)])
def test_gradients_are_as_large_as_the_models_parameters(box: int, channels: tuple[int, ...], hidden: int) -> None:
    config = config_from_dict({"pose": {"source": "encoder", "centred": True},
                               "encoder": {"network": "cnn", "channels": [*channels], "hidden": hidden}})  # fmt: skip
    built = build_autoencoder(config, box, 1)
    assert model.volume_bytes(box) == size(*built.volume.parameters())
    assert model.volume_bytes(box, 2) == size(*(p.half() for p in built.volume.parameters()))
    assert 4 * model.encoder_parameters(box, channels, hidden) == size(*built.pose_source.parameters())


def test_grid_encoder_is_as_large_as_the_real_one() -> None:
    pixels = len(fourier_pixels(32, ENCODER_RADIUS))
    assert pixels == cost_model.ENCODER_PIXELS
    encoder = GridEncoder(with_flips(so3_grid(HALF_GRID)), pixels, cost_model.GRID_HIDDEN, 1.0)
    assert 4 * cost_model.grid_encoder_parameters() == size(*encoder.parameters())


@pytest.mark.parametrize("box", [16, 30])
@pytest.mark.parametrize("padding", [1.0, 1.5, 2.0])
def test_accumulators_are_as_large_as_the_half_maps(box: int, padding: float) -> None:
    assert cost_model.accumulator_bytes(box, padding) == size(*Backprojection(box, padding).tensors())


@pytest.mark.parametrize("radius", [0.0, 1.0, 2.5, 7.0])
def test_half_ball_counts_lattice_points(radius: float) -> None:
    axis = torch.arange(-8, 9)
    z, y, x = torch.meshgrid(axis, axis, axis[8:], indexing="ij")
    assert cost_model.half_ball_points(radius) == int((x * x + y * y + z * z <= radius * radius).sum())


def test_half_ball_nears_the_balls_volume() -> None:
    # Half a ball, and half of the plane kx = 0, which is held whole. Lattice points of a sphere: error below r^(3/2).
    for radius in (20.0, 63.0, 127.0):
        closed = 2 * math.pi * radius**3 / 3 + math.pi * radius**2 / 2
        assert abs(cost_model.half_ball_points(radius) - closed) < radius**1.5
    # A real map's transform in float16 up to Nyquist: π/6 of the cube's numbers, at half the bytes.
    assert model.ball_bytes(63.0) / model.volume_bytes(126) == pytest.approx(math.pi / 6 / 2, rel=0.02)


@pytest.mark.parametrize(("box", "reach"), [(16, 4.0), (32, 15.0), (32, 9.0)])
def test_slices_stay_within_the_accumulators_ball(box: int, reach: float) -> None:
    # Many random slices: all that they touch lies within the ball, and they touch almost all of it.
    sums, pixels, count = Backprojection(box), fourier_pixels(box, reach), 600
    rotation = random_rotations(count, torch.Generator().manual_seed(0))
    images = ctf_weighted(torch.ones(count, len(pixels), dtype=torch.complex64), None)
    half = 1 + torch.arange(count) % 2
    sums.add(images, rotation, torch.zeros(count, 2), torch.ones(count), half, pixels)
    touched = int((sums.denominator != 0).sum())
    bound = cost_model.accumulator_ball_bytes(reach) / 12
    assert 0.7 * bound < touched <= bound


@pytest.mark.parametrize("radius", [14.0, 40.0, 60.0])
def test_reach_is_that_of_an_iteration(radius: float) -> None:
    plan = plan_iteration(radius, (128,), 5, searched=False, shifted=True)
    assert cost_model.iteration_reach(plan.level, plan.radius) == plan.insertion_radius


def test_poses_are_as_large_as_what_an_iteration_writes() -> None:
    numbers = sum(math.prod(shape) for shape in SCHEMA.values())
    assert cost_model.poses_bytes(10) == 10 * (8 + 4 * numbers)  # a row, and single precision


def test_all_reduce_of_a_ring() -> None:
    assert cost_model.ring_seconds(1e9, 1, 1e9, 1e-3) == 0
    assert cost_model.ring_seconds(1e9, 2, 1e9, 1e-3) == pytest.approx(1 + 2e-3)  # one hop each way
    assert cost_model.ring_seconds(1e9, 512, 1e9, 0) == pytest.approx(2 * 511 / 512)
    assert cost_model.ring_seconds(0, 512, 1e9, 1e-3) == pytest.approx(18e-3)  # a tree's depth, twice
    # Within a node NVLink counts, over nodes the network.
    assert cost_model.all_reduce_seconds(1e9, 8, cost_model.H100) == pytest.approx(2 * 7 / 8 / 360, rel=0.02)
    assert cost_model.all_reduce_seconds(1e9, 64, cost_model.H100) == pytest.approx(2 * 7 / 8 / 20, rel=0.02)


def test_terms_of_a_pass_add_up() -> None:
    for predict in (model.predict_steps, cost_model.predict_iteration):
        for box in model.BOXES:
            rates = [predict(box, gpus, cost_model.H100) for gpus in (1, *model.GPUS)]
            assert all(found.seconds == sum(found.terms.values()) for found in rates)
            assert all(found.terms[key] >= 0 for found in rates for key in found.terms)
            assert rates[0].terms["sum"] == 0
            # More GPUs never take longer; they cost more.
            assert [r.seconds for r in rates] == sorted((r.seconds for r in rates), reverse=True)
            assert [r.dollars for r in rates] == sorted(r.dollars for r in rates)
