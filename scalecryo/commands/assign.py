"""`scalecryo assign`: a pose for every particle, half-maps, FSC and the final map of a trained run."""

import dataclasses

import torch

from scalecryo.commands.console import say
from scalecryo.config import config_from_dict
from scalecryo.data import files
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.subset import choose
from scalecryo.train.assign import Poser, assign_particles
from scalecryo.train.batches import data_hash
from scalecryo.train.checkpoint import newest_step
from scalecryo.train.guided.run import load_guided_poser
from scalecryo.train.logs import log_to_stderr
from scalecryo.train.loop import load_trained
from scalecryo.train.model_poser import ModelPoser
from scalecryo.train.posed_parts import FOLDER as PARTS
from scalecryo.train.run_folder import RunFolder
from scalecryo.train.world import World


def run(run: str, *, data: str | None, out: str | None) -> None:
    """Load the run's newest checkpoint, stream the store once, and write the results."""
    log_to_stderr()
    trained = RunFolder(files.absolute(run))
    values = dataclasses.asdict(trained.config())
    if data is not None:
        values["run"]["data"] = files.absolute(data)
    config = config_from_dict(values)
    store = ParticleStore.open(config.run.data)
    device = torch.device(config.run.device if torch.cuda.is_available() else "cpu")
    same = data is None
    if config.pose.source == "guided":
        poser: Poser = load_guided_poser(config, store, trained, device, same_store=same)
        learned = None
    else:
        model = load_trained(config, store, trained, same_store=same).to(device)
        poser, learned = ModelPoser(config, store, model), model.volume.density()
    target = trained if out is None else RunFolder(files.absolute(out))
    if out is not None:
        target.create(config, resume=files.exists(target.path(PARTS)))  # a killed assignment goes on
    subset = choose(config.train, store) if same else None
    identity = f"{data_hash(store, subset)}-{newest_step(trained)}"
    assign_particles(config, store, poser, target, World(), device, identity=identity, subset=subset, learned=learned)
    target.sync()
    target.close()
    say(f"assigned {store.count} particles: {target.path('particles.star')}")
