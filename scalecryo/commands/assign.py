"""`scalecryo assign`: a pose for every particle, half-maps, FSC and the final map of a trained run."""

import dataclasses

import torch

from scalecryo.commands.closing import say_results
from scalecryo.commands.console import say
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.log import log_to_stderr
from scalecryo.train.forecast import Forecast, parts_of
from scalecryo.train.loop import load_trained, run_stages
from scalecryo.train.particle_state import FOLDER as PARTS
from scalecryo.train.progress import RunProgress
from scalecryo.train.recipes import variety_stages
from scalecryo.train.stage import Stage
from scalecryo.train.stages.final_pass import FinalPass
from scalecryo.train.stages.placed import PlacedParticles


def run(run: str, *, data: str | None, out: str | None) -> None:
    """Load the run's newest checkpoint, stream the store once, and write the results."""
    line = log_to_stderr()
    trained = RunFolder(urls.absolute(run))
    config = trained.config()
    if data is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, data=urls.absolute(data)))
    store = ParticleStore.open(config.run.data)
    device = torch.device(config.run.device if torch.cuda.is_available() else "cpu")
    same = data is None
    context, learned = load_trained(config, store, trained, device, same_store=same)
    target = trained if out is None else RunFolder(urls.absolute(out))
    stages: list[Stage] = [FinalPass(context, learned, out=None if out is None else target, remember=same)]
    if out is not None:
        target.create(config, resume=urls.exists(target.path(PARTS)))  # a killed assignment goes on
    if config.train.components and same and out is None:
        stages += variety_stages(context, learned)
    elif config.train.components:
        placed = PlacedParticles.of(context, learned, target)
        stages += [] if placed is None else [placed]
        if not same:
            learned.groups = None  # those of another store are others
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, components=0))
    progress = RunProgress(Forecast(parts_of(config, store.count, store.levels)), line, 1)
    run_stages(stages, context, progress=progress)
    line.hide()
    target.sync()
    target.close()
    say(f"assigned {store.count} particles: {target.path('particles.star')}")
    if out is None:
        say_results(target)
