"""Whole runs on a device that refuses what a GPU refuses: no tensor is left on the host, nor reduced from there.

Two workers share gloo, which takes what lies on the emulated device alone, as NCCL does: a tensor of the host in a
collective ends the run.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from scalecryo.config import Config, load_config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import ParticleReader, RunContext
from scalecryo.train.recipes import stages_of
from scalecryo.train.stages import classification, components
from tests.conftest import SimulatedParticles
from tests.support.emulated_device import DEVICE, EmulatedDevice, HostTensorRefusedError
from tests.support.gloo import by_workers

RECIPES = {
    "autoencoder": {"pose.source": "encoder", "autoencoder.starts": "2", "autoencoder.start_steps": "2",
                    "autoencoder.steps": "4", "autoencoder.level_steps": "1", "train.final_pass": "false"},
    "paper": {"pose.source": "encoder", "encoder.network": "cnn", "encoder.channels": "4,8", "encoder.hidden": "8",
              "train.steps": "3", "monitor.every": "1", "train.final_pass": "false"},
    "poses": {"guided.start": "poses", "guided.iterations": "3", "guided.settled_iterations": "3",
              "guided.encoder_hidden": "16", "guided.shift_radius_a": "6", "guided.batch_size": "100",
              "train.final_pass": "false"},
}  # fmt: skip
# No step of the encoder: DDP looks at the device's name by itself.
GUIDED = {"guided.iterations": "1", "guided.bootstrap_steps": "8", "guided.starts": "1", "guided.encoder_steps": "0",
          "guided.bootstrap_rounds": "1", "guided.shift_radius_a": "4", "guided.batch_size": "100"}  # fmt: skip


def made(settings: dict[str, str], data: str, out: Path, workers: int) -> Config:
    config = load_config(None, settings)
    run = dataclasses.replace(config.run, data=data, out=str(out), workers=str(workers))
    config = dataclasses.replace(config, run=run)
    RunFolder(run.out).create(config, resume=False)
    return config


def test_a_batch_of_local_refinement_waits_five_times(simulated: SimulatedParticles, tmp_path: Path) -> None:
    """Nothing else than these is read by the host, which would leave the device idle.

    Rows of each half, once, and of each map; of each half those without a remembered pose (whose number decides what is
    computed); and rows, since what is remembered lies on the host. Before they were counted there were 22.
    """
    config = made(RECIPES["poses"] | {"guided.encoder_steps": "0"}, simulated.posed_store, tmp_path / "run", 0)
    store, run = ParticleStore.open(config.run.data), RunFolder(config.run.out)
    with EmulatedDevice() as device:
        context = RunContext.of(config, store, run, World(), DEVICE)
        (imported, refinement, *_), _ = stages_of(context)
        run_stages([imported], context)
        reader = ParticleReader(context)
        counts = []
        for images in reader.batches(refinement.request()):
            device.waits.clear()
            refinement.step(*images)
            counts.append(dict(device.waits))
        reader.close()
    # Both reads of grouped rows and that of rows are copies to the host.
    assert counts == [{"_to_copy": 3, "nonzero": 2}] * 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_keeps_its_tensors_on_the_device(
    recipe: str, simulated: SimulatedParticles, tmp_path: Path
) -> None:
    exported = tmp_path / "run.prom"
    settings = RECIPES[recipe] | {"monitor.prometheus": str(exported)}
    with EmulatedDevice() as device:
        loop.train(made(settings, simulated.posed_store, tmp_path / "run", 0), World(), DEVICE)
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
    assert device.waits
    text = exported.read_text()
    assert re.search(r"^scalecryo_images_per_second\{run=", text, flags=re.MULTILINE)
    assert re.search(r"^scalecryo_step\{run=\S+\} [1-9]", text, flags=re.MULTILINE)


def train_on_device(world: World, given: dict[str, Config], folder: str) -> None:
    """Train one run after the other; each leaves how often it called which collective."""
    components.PASSES, classification.STARTS, classification.MOST_PASSES = 4, 2, (1, 1)
    with EmulatedDevice() as device:
        with pytest.raises(HostTensorRefusedError):
            world.all_reduce_(torch.ones(2))
        for name, config in given.items():
            device.collectives.clear()
            device.objects = 0
            if name == "guided":
                loop.train(config, world, DEVICE)
            else:
                store, run = ParticleStore.open(config.run.data), RunFolder(config.run.out)
                context = RunContext.of(config, store, run, world, DEVICE)
                stages, _ = stages_of(context)
                wanted = {"classes": stages[:2], "components": stages[1:], "symmetry": stages[:1]}[name]
                run_stages(wanted, context)
            counts = device.collectives | {"objects": device.objects}
            Path(folder, f"{name}.{world.rank}").write_text(json.dumps(counts))


def test_two_workers_reduce_nothing_that_lies_on_the_host(simulated: SimulatedParticles, tmp_path: Path) -> None:
    """From nothing; and the other ways on which each map's sums are added and solved by its owner."""
    chosen = {
        "guided": GUIDED,
        "classes": RECIPES["poses"] | {"train.classes": "2"},
        "components": {"pose.source": "known", "train.steps": "1", "train.components": "2"},
        "symmetry": RECIPES["poses"] | {"train.symmetry": "C2"},
    }
    given = {
        name: made(settings, simulated.store if name == "guided" else simulated.posed_store, tmp_path / name, 2)
        for name, settings in chosen.items()
    }
    by_workers(train_on_device, given, str(tmp_path))
    assert (tmp_path / "guided" / "map.mrc").exists()
    assert (tmp_path / "components" / "components" / "component2.mrc").exists()
    found = {name: [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in range(2)] for name in given}
    for first, second in found.values():
        assert first == second  # every collective is everyone's
        assert first["reduce_"] >= 1
        assert first["broadcast_"] >= 1
    assert found["guided"][0]["allreduce_"] > 8
    # Names of parts, once a pass that finds poses: the iteration and the final pass.
    assert found["guided"][0]["objects"] == 2
