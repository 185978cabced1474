"""`scalecryo assign`: a pose for every particle, half-maps, FSC and the final map of a trained run."""

import dataclasses

import torch

from scalecryo.commands.console import say
from scalecryo.data.io import urls
from scalecryo.data.selection.subset import choose
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.runs.checkpoint import newest_step
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.logs import log_to_stderr
from scalecryo.train.batches import data_hash
from scalecryo.train.guided_run import load_guided_poser
from scalecryo.train.loop import load_trained
from scalecryo.train.posed_parts import FOLDER as PARTS
from scalecryo.train.stages.final_pass import Poser, assign_particles
from scalecryo.train.stages.model_poser import ModelPoser


def run(run: str, *, data: str | None, out: str | None) -> None:
    """Load the run's newest checkpoint, stream the store once, and write the results."""
    log_to_stderr()
    trained = RunFolder(urls.absolute(run))
    config = trained.config()
    if data is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, data=urls.absolute(data)))
    store = ParticleStore.open(config.run.data)
    device = torch.device(config.run.device if torch.cuda.is_available() else "cpu")
    same = data is None
    if config.pose.source == "guided":
        poser: Poser = load_guided_poser(config, store, trained, device, same_store=same)
        learned = None
    else:
        model = load_trained(config, store, trained, same_store=same).to(device)
        poser, learned = ModelPoser(config, store, model), model.volume.density()
    target = trained if out is None else RunFolder(urls.absolute(out))
    if out is not None:
        target.create(config, resume=urls.exists(target.path(PARTS)))  # a killed assignment goes on
    subset = choose(config.train, store) if same else None
    identity = f"{data_hash(store, subset)}-{newest_step(trained)}"
    assign_particles(config, store, poser, target, World(), device, identity=identity, subset=subset, learned=learned)
    target.sync()
    target.close()
    say(f"assigned {store.count} particles: {target.path('particles.star')}")
