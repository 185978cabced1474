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
from scalecryo.data.selection.partition import PARTS
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed import gradients
from scalecryo.distributed.world import World
from scalecryo.pose.related import RelatedPoses
from scalecryo.runs.folder import RunFolder
from scalecryo.train import autoencoder_training, encoder_training, latent_training, loop
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import ParticleReader, RunContext
from scalecryo.train.recipes import stages_of
from scalecryo.train.stages import components, on_axes
from scalecryo.train.stages.classification import Classification
from scalecryo.train.stages.refinement import Refinement
from scalecryo.train.stages.related_offers import RelatedOffer, RelatedOffers
from scalecryo.train.stages.schedule import Schedule
from tests.conftest import SimulatedParticles
from tests.support.emulated_device import DEVICE, EmulatedDevice, HostTensorRefusedError, averaging, collective_places
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
GUIDED = {"guided.iterations": "1", "guided.bootstrap_steps": "3", "guided.starts": "1", "guided.encoder_steps": "0",
          "guided.bootstrap_rounds": "1", "guided.shift_radius_a": "4", "guided.batch_size": "100",
          "train.rows": "200"}  # fmt: skip
#: What is made of the recipes, to the end.
WHOLE = {
    "symmetry": GUIDED | {"guided.encoder_steps": "2", "train.symmetry": "C2"},
    "classes": GUIDED | {"train.classes": "2", "train.symmetry": "C2"},
    "components": {"pose.source": "known", "train.steps": "1", "train.components": "2"},
}
#: Related poses: the identity, a half turn, which this map tells at once, and a turn of 2°, which it hardly does.
TURNS = torch.linalg.matrix_exp(torch.tensor([0.0, torch.pi, 0.035])[:, None, None] * torch.tensor(
    [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
))  # fmt: skip
#: Functions with collectives that no run below comes through: what they do is left to tests of workers on the host.
UNREACHED = {
    "train/owned_sums.py: drawn_to_symmetry",
    "pose/related.py: of_leader",
    "runs/paused.py: save_pause",
    "train/stages/class_restarts.py: _judged_duels",
    "train/stages/class_splits.py: _likeness",
    "train/stages/class_start.py: _choose",
    "train/stages/class_start.py: _join_alike",
    "train/stages/coordinates.py: _mixture",
    "train/stages/ensemble.py: _finish_labels",
    "train/stages/ensemble.py: finish_pass",
    "train/stages/latent_encoding.py: finish_pass",
    "train/stages/placed.py: finish_pass",
    "train/stages/related_offers.py: look_at",
    "train/stages/state_poses.py: finish_pass",
}


def made(settings: dict[str, str], data: str, out: Path, workers: int) -> Config:
    config = load_config(None, settings)
    run = dataclasses.replace(config.run, data=data, out=str(out), workers=str(workers))
    config = dataclasses.replace(config, run=run)
    RunFolder(run.out).create(config, resume=False)
    return config


def begun(simulated: SimulatedParticles, out: Path) -> tuple[RunContext, Refinement]:
    """A refinement without the encoder, before its first iteration, of poses that came with the particles."""
    config = made(RECIPES["poses"] | {"guided.encoder_steps": "0"}, simulated.posed_store, out, 0)
    store, run = ParticleStore.open(config.run.data), RunFolder(config.run.out)
    context = RunContext.of(config, store, run, World(), DEVICE)
    (imported, refinement, *_), _ = stages_of(context)
    run_stages([imported], context)
    assert isinstance(refinement, Refinement)
    return context, refinement


def waits_of(refinement: Refinement, context: RunContext, device: EmulatedDevice) -> list[dict[str, int]]:
    """Make an iteration; what each of its batches waited for."""
    reader = ParticleReader(context)
    counts = []
    for images in reader.batches(refinement.request()):
        device.waits.clear()
        refinement.step(*images)
        counts.append(dict(device.waits))
    reader.close()
    refinement.finish_pass(World())
    return counts


@pytest.mark.parametrize("offers", [False, True], ids=["alone", "related_poses"])
def test_a_batch_of_local_refinement_waits_five_times(
    offers: bool, simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else than these is read by the host, which would leave the device idle; offers of related poses add none.

    Rows of each half, once, and of each map; of each half those without a remembered pose (whose number decides what is
    computed); and rows, since what is remembered lies on the host. Before they were counted there were 22.
    """
    taken: list[float | None] = []
    monkeypatch.setattr(RelatedOffers, "note", lambda _, share: taken.append(share))
    with EmulatedDevice() as device:
        context, refinement = begun(simulated, tmp_path / "run")
        if offers:
            related = RelatedPoses(TURNS.to(DEVICE), torch.zeros(len(TURNS), 3).to(DEVICE))
            assert refinement._learned.references is not None
            refinement._offer = RelatedOffer(related, refinement._learned.references)
            refinement._offers._any = True
            monkeypatch.setattr(RelatedOffers, "at", lambda *_: related)
        counts = waits_of(refinement, context, device)
        following = refinement._offer
    # Both reads of grouped rows and that of rows are copies to the host.
    assert counts == [{"_to_copy": 3, "nonzero": 2}] * 3
    (share,) = taken
    assert (share is not None and 0 < share < 1) if offers else share is None
    assert (following is not None and following.references.maps.device.type == DEVICE.type) == offers


def test_a_batch_that_is_searched_waits_thirteen_times(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, halves and maps as above; which of a half's particles have a pose decides what is searched: once against
    each map, of which an iteration after the first has one for each part of a half. The parts are told apart once, and
    once more by whether an image says so little that it is searched for more modes.
    """
    monkeypatch.setattr(Schedule, "_after_search", lambda *_: None)  # which ends where hardly a pose has changed
    with EmulatedDevice() as device:
        context, refinement = begun(simulated, tmp_path / "run")
        refinement._schedule = Schedule(2, 2)
        whole, parts = (waits_of(refinement, context, device) for _ in range(2))
    assert whole == [{"_to_copy": 3 + 2}] * 3
    assert parts == [{"_to_copy": 3 + 2 * PARTS + 2}] * 3


@pytest.mark.parametrize("recipe", [*RECIPES, *WHOLE])
def test_every_recipe_keeps_its_tensors_on_the_device(
    recipe: str, simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "PASSES", 4)
    monkeypatch.setattr(on_axes, "REFUSED", -1.0)  # the particles have no symmetry: the way is what is tested
    exported = tmp_path / "run.prom"
    settings = (RECIPES | WHOLE)[recipe] | {"monitor.prometheus": str(exported)}
    with EmulatedDevice() as device:
        loop.train(made(settings, simulated.posed_store, tmp_path / "run", 0), World(), DEVICE)
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
    assert device.waits
    text = exported.read_text()
    assert re.search(r"^scalecryo_images_per_second\{run=", text, flags=re.MULTILINE)
    assert re.search(r"^scalecryo_step\{run=\S+\} [1-9]", text, flags=re.MULTILINE)


def train_on_device(world: World, given: dict[str, Config], folder: str) -> None:
    """Train one run after the other; each leaves how often it called which collective."""
    components.PASSES, Classification.starts, Classification.most_passes = 4, 2, (1, 1)
    on_axes.REFUSED = -1.0
    for module in (gradients, autoencoder_training, encoder_training, latent_training):
        vars(module)["replicated"] = averaging
    with EmulatedDevice() as device:
        with pytest.raises(HostTensorRefusedError):
            world.all_reduce_(torch.ones(2))
        for name, config in given.items():
            device.collectives.clear()
            device.objects = 0
            if name in ("guided", *RECIPES):
                loop.train(config, world, DEVICE)
            else:
                store, run = ParticleStore.open(config.run.data), RunFolder(config.run.out)
                context = RunContext.of(config, store, run, world, DEVICE)
                stages, _ = stages_of(context)
                wanted = {"classes": stages[:3], "components": stages[1:], "symmetry": stages[:1]}[name]
                run_stages(wanted, context)
            counts = device.collectives | {"objects": device.objects}
            Path(folder, f"{name}.{world.rank}").write_text(json.dumps(counts))
    Path(folder, f"{world.rank}.places").write_text(json.dumps(sorted(device.places)))


@pytest.fixture(scope="module")
def by_two(simulated: SimulatedParticles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers: every recipe, and the ways on which a map's sums are added and solved by its owner."""
    folder = tmp_path_factory.mktemp("two")
    chosen = RECIPES | {
        "guided": GUIDED,
        "classes": RECIPES["poses"] | {"train.classes": "2"},
        "components": WHOLE["components"],
        "symmetry": RECIPES["poses"] | {"train.symmetry": "C2"},
    }
    given = {
        name: made(settings, simulated.store if name == "guided" else simulated.posed_store, folder / name, 2)
        for name, settings in chosen.items()
    }
    by_workers(train_on_device, given, str(folder))
    return folder


def test_two_workers_reduce_nothing_that_lies_on_the_host(by_two: Path) -> None:
    assert (by_two / "guided" / "map.mrc").exists()
    assert (by_two / "components" / "components" / "component2.mrc").exists()
    found = {path.name.removesuffix(".0"): [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(2)]
             for path in by_two.glob("*.0")}  # fmt: skip
    assert set(RECIPES) < set(found)
    for first, second in found.values():
        assert first == second  # every collective is everyone's
    for name in ("guided", "classes", "components", "symmetry"):
        assert found[name][0]["reduce_"] >= 1
        assert found[name][0]["broadcast_"] >= 1
    assert found["guided"][0]["allreduce_"] > 8
    # Names of parts, once a pass that finds poses: the iteration and the final pass.
    assert found["guided"][0]["objects"] == 2


def test_places_of_collectives_are_reached_or_named(by_two: Path) -> None:
    reached = {place for path in by_two.glob("*.places") for place in json.loads(path.read_text())}
    left = collective_places() - reached
    assert left == UNREACHED, "\n".join(sorted(left ^ UNREACHED))
