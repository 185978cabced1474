"""Recipes: which stages a run is made of. A new stage needs one file and one line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from scalecryo.model.grid_encoder import GridEncoder
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import with_flips
from scalecryo.train.encoder_training import EncoderTrainer
from scalecryo.train.particle_source import RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned, Stage
from scalecryo.train.stages.autoencoder import AutoEncoding
from scalecryo.train.stages.bootstrap import Bootstrap
from scalecryo.train.stages.class_maps import ClassMaps
from scalecryo.train.stages.class_splits import ClassSplits
from scalecryo.train.stages.classification import Classification
from scalecryo.train.stages.common_map import CommonMap
from scalecryo.train.stages.components import Components
from scalecryo.train.stages.coordinates import CoordinatePass
from scalecryo.train.stages.ensemble import Ensemble
from scalecryo.train.stages.final_pass import FinalPass
from scalecryo.train.stages.found_classes import FoundClassStart
from scalecryo.train.stages.gradient_descent import GradientDescent
from scalecryo.train.stages.imported_poses import ImportedPoses
from scalecryo.train.stages.latent_encoding import LatentEncoding
from scalecryo.train.stages.refinement import Refinement
from scalecryo.train.stages.relabelling import Relabelling
from scalecryo.train.stages.start_rounds import HALF_GRID
from scalecryo.train.stages.state_maps import StateMaps
from scalecryo.train.stages.state_poses import ROUNDS, StatePoses

ENCODER_RADIUS = 12.0  # Fourier pixels that the encoder sees
REFINED = ("guided", "poses")  # recipes whose poses are of references, not of a model or known

StageMaker = Callable[[RunContext, Learned], Stage]
RECIPES: Mapping[str, tuple[StageMaker, ...]] = MappingProxyType(
    {
        "guided": (Bootstrap, Refinement, FinalPass),
        "poses": (ImportedPoses, Refinement, FinalPass),
        "autoencoder": (AutoEncoding, Refinement, FinalPass),
        "paper": (GradientDescent, FinalPass),
        "known": (GradientDescent, FinalPass),
        "table": (GradientDescent, FinalPass),
    }
)
CLASS_RECIPES: Mapping[str, tuple[StageMaker, ...]] = MappingProxyType(
    {
        "independent": (ClassSplits, Refinement, FinalPass),
        "auto": (Ensemble, FoundClassStart, Refinement, FinalPass),
        "docked": (Bootstrap, CommonMap, Classification, ClassMaps, Refinement, Relabelling, FinalPass),
        "poses": (ImportedPoses, CommonMap, Classification, Refinement, Relabelling, FinalPass),
    }
)
"""With several classes: by `train.class_mode`, or from imported poses; `auto` where their number is sought too."""
VARIETY: tuple[StageMaker, ...] = (CoordinatePass, LatentEncoding, StateMaps)
"""Behind what learns components."""


def variety_stages(context: RunContext, learned: Learned) -> list[Stage]:
    """Behind the final pass, with `train.components`: poses that references gave are refined with the components."""
    stages: list[Stage] = [Components(context, learned)]
    for rounds in range(ROUNDS if context.config.recipe in REFINED else 0):
        stages += [StatePoses(context, learned, rounds), Components(context, learned, rounds + 1)]
    return [*stages, *(maker(context, learned) for maker in VARIETY)]


def stages_of(context: RunContext) -> tuple[list[Stage], Learned]:
    """The stages of a run, and what they will learn; but for those that the settings leave out."""
    recipe = context.config.recipe
    learned = Learned(ParticleState(context.run, context.store.count))
    many = context.config.train.several
    if recipe in ("guided", "poses") and not many:  # the encoder knows one map
        learned.encoder = _encoder_trainer(context)
    config = context.config
    left_out: list[StageMaker] = [FinalPass] if not config.train.final_pass else []
    left_out += [Refinement] if recipe == "autoencoder" and not config.autoencoder.refine else []
    chosen = RECIPES[recipe]
    if many:
        mode = config.train.class_mode if config.train.classes else "auto"
        chosen = CLASS_RECIPES["poses" if recipe == "poses" else mode]
    stages = [maker(context, learned) for maker in chosen if maker not in left_out]
    return stages + (variety_stages(context, learned) if config.train.components else []), learned


def _encoder_trainer(context: RunContext) -> EncoderTrainer | None:
    """The encoder and its optimiser, at the store's smallest level; None where it learns nothing. Collective."""
    settings, store, world = context.config.guided, context.store, context.world
    if settings.encoder_steps == 0:
        return None
    level, seed = min(store.levels), context.config.train.seed
    pixels, pixel_size = context.pixels(level, min(level / 2 - 1, ENCODER_RADIUS)), store.level_pixel_size(level)
    sigma = context.shift_radius / 2 / pixel_size if context.fit_shift else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = with_flips(so3_grid(HALF_GRID))
        encoder = GridEncoder(grid, len(pixels), settings.encoder_hidden, max(sigma, 0.1)).to(context.device)
    return EncoderTrainer(
        encoder, pixels, pixel_size, rate=settings.encoder_rate, shift_sigma_px=sigma, world=world,
        reduce_dtype=context.config.optim.reduce_dtype, seed=seed + world.rank, group=context.point_group,
    )  # fmt: skip
