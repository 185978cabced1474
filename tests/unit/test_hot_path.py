"""The training step never waits for its device: no values read on the host, no copies between devices.

On the meta device tensors have no values, so reading one is an error by itself; the watch below names what else would
make a host wait for a GPU. On a real GPU tests/gpu repeats this with torch's own sync debug mode.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalecryo.config import Config, config_from_dict
from scalecryo.distributed.world import World
from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.map.running_maps import RunningMaps
from scalecryo.model.autoencoder import AutoEncoder, build_autoencoder
from scalecryo.model.circle_encoder import CircleEncoder, CircleTransform
from scalecryo.physics.ctf import CtfParameters
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose import local_refinement_torch
from scalecryo.pose.related import RelatedPoses
from scalecryo.train.autoencoder_training import AutoEncoderTrainer, StepPlan, Whitening
from scalecryo.train.stages.gradient_descent import build_optimiser

BOX, BATCH = 32, 4
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "item"}


class HostSyncError(AssertionError):
    pass


class NoHostSync(TorchDispatchMode):
    """Refuses operations that wait for the device: data-dependent ones, boolean indexing, copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name in _READS:
            raise HostSyncError(f"{func} reads values of the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostSyncError(f"{func} by a mask: the number of results is read on the host")
        result = func(*args, **(kwargs or {}))
        # Tensors may be made on the device, not moved to it. Numbers on the host travel with the kernel's arguments.
        tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.dim())
        devices = {str(t.device) for t in tensors}
        if len(devices) > 1:
            raise HostSyncError(f"{func} copies between {' and '.join(sorted(devices))}")
        return result


def config(**pose: Any) -> Config:
    sections = {
        "pose": pose,
        "encoder": {"network": "cnn", "channels": [4, 4], "hidden": 8},
        "train": {"batch_size": BATCH},
    }
    return config_from_dict(sections)


def inputs(device: str, box: int = BOX, batch: int = BATCH) -> ParticleImages:
    one = torch.ones(batch)
    optics = CtfParameters(10_000 * one, 9_000 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
    poses = Poses(random_rotations(batch, torch.Generator()).to(device), torch.zeros(batch, 2).to(device))
    rows = torch.arange(batch).to(device)
    return ParticleImages(
        rows=rows, half=1 + rows % 2, weight=one.to(device), optics_group=rows * 0,
        pixels=fourier_pixels(box).to(device), pixel_size=2.0, optics=optics.to(device), poses=poses,
        real=torch.randn(batch, box, box).to(device),
    )  # fmt: skip


def step(model: AutoEncoder, batch: ParticleImages) -> Tensor:
    loss = model(batch).loss.sum()
    loss.backward()
    return loss


SOURCES = [
    {"source": "encoder"},
    {"source": "encoder", "heads": 3, "copies": 2},
    {"source": "encoder", "copies": 8},
    {"source": "encoder", "parameterisation": "quaternion"},
    {"source": "encoder", "parameterisation": "euler", "centred": True},
    {"source": "table"},
    {"source": "known"},
]


@pytest.mark.parametrize("pose", SOURCES, ids=lambda pose: "-".join(str(value) for value in pose.values()))
def test_forward_and_backward_never_wait_for_the_device(pose: dict[str, Any]):
    model, batch = build_autoencoder(config(**pose), BOX, 10).to("meta"), inputs("meta")
    with NoHostSync() as watch:
        loss = step(model, batch)
    assert {"fourier_slice", "fourier_slice_backward"} <= watch.seen
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_whole_step_with_optimiser_runs_on_fake_tensors(precision: str):
    # Fake tensors refuse every operation whose result depends on values.
    settings = config_from_dict(
        {
            "pose": {"source": "encoder"},
            "encoder": {"network": "cnn", "channels": [4, 4], "hidden": 8, "precision": precision},
        }
    )
    model, batch = build_autoencoder(settings, BOX, 10), inputs("cpu")
    optimiser = build_optimiser(settings, model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = step(model, batch)
        optimiser.step()
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_local_refinement_never_waits_for_the_device():
    # What a GPU runs but for the fused sums, which are one kernel.
    shape = (BATCH, 50)
    problem = local_refinement_torch.Problem(
        volume_rfft=torch.empty(32, 32, 17, dtype=torch.complex64, device="meta"),
        observed=torch.empty(shape, dtype=torch.complex64, device="meta"),
        ctf=torch.empty(shape, device="meta"),
        weight=torch.empty(50, device="meta"), kx=torch.empty(50, device="meta"), ky=torch.empty(50, device="meta"),
        scale=2.0, box_size=16,
    )  # fmt: skip
    pose = torch.empty(BATCH, 3, 3, device="meta"), torch.empty(BATCH, 2, device="meta")
    with NoHostSync():
        found = local_refinement_torch.refine_batch(problem, *pose, 3, 5, 0.1, 2.0)
    assert found[0].shape == (BATCH, 3, 3)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.to("cpu" if x.is_meta else "meta"),
        lambda x: bool(x.any()),
        lambda x: x.new_zeros(3).copy_(torch.zeros(3, device="cpu" if x.is_meta else "meta")),
    ],
    ids=["item", "mask", "nonzero", "masked_select", "to", "bool", "copy_"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_watch_sees_what_it_should(fault: Any, device: str):
    values = torch.ones(3, device=device)
    with NoHostSync(), pytest.raises((HostSyncError, RuntimeError, NotImplementedError)):
        fault(values)


def on_meta(thing: Any) -> None:
    """Move an object's tensors, those of what it holds included, to the meta device, in place."""
    for name, value in vars(thing).items():
        if isinstance(value, Tensor):
            setattr(thing, name, value.to("meta"))
        elif type(value).__module__.startswith("scalecryo.map"):
            on_meta(value)


def test_a_step_of_the_auto_encoder_never_waits_for_the_device():
    # Halves apart, a pseudo-symmetry, CTFs, shifts, and the maps' solution: everything that a step can do.
    images, pixels = inputs("meta"), fourier_pixels(BOX)
    encoder = CircleEncoder(6, 8, 2, 8, parameterisation="s2s2", centred=False).to("meta")
    circles = CircleTransform(6)
    circles.pixels = circles.pixels.to("meta")
    trainer = AutoEncoderTrainer(
        encoder, circles.to("meta"), pixels.to("meta"), 2.0, rate=1e-3, search_radius=8.0, world=World(),
        reduce_dtype="float32",
    )  # fmt: skip
    trainer._optimiser = torch.optim.SGD(encoder.parameters(), lr=1.0)  # Adam counts its steps on the host
    noise = BackgroundNoise(pixels, "cpu")
    noise.add(torch.randn(BATCH, BOX, BOX), torch.zeros(BATCH, dtype=torch.long), torch.ones(BATCH))
    white, maps = Whitening(noise), RunningMaps(BOX, 1.0, "cpu")
    norm = white.image_power(pixels, 10.0)
    on_meta(maps)
    white.variance = white.variance.to("meta")
    trainer.set_maps(maps)
    trainer.related = RelatedPoses(torch.eye(3, device="meta").expand(2, 3, 3), torch.zeros(2, 3, device="meta"))
    with NoHostSync() as watch:
        loss, rotation = trainer.step(images, white(images), StepPlan(10.0, 1e-3, 0.9), norm)
    assert {"fourier_slice", "fourier_slice_backward"} <= watch.seen
    assert loss.device.type == rotation.device.type == "meta"
