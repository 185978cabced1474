"""What a setting is, the recipes that read it, and the settings of what is learnt by gradient: encoder and volume.

Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from scalecryo.errors import ConfigError

Recipe = Literal["guided", "poses", "autoencoder", "paper", "known", "table"]
Device = Literal["cpu", "cuda"]
PoseSourceName = Literal["guided", "encoder", "known", "table"]
Parameterisation = Literal["s2s2", "quaternion", "euler"]
ReduceDtype = Literal["float32", "bfloat16"]
KernelName = Literal["auto", "reference", "cpu", "cuda"]

#: The recipes, and what chooses each.
RECIPES: dict[Recipe, str] = {
    "guided": "pose.source = guided, guided.start = nothing",
    "poses": "pose.source = guided, guided.start = poses",
    "autoencoder": "pose.source = encoder, encoder.network = circles",
    "paper": "pose.source = encoder, encoder.network = cnn",
    "known": "pose.source = known",
    "table": "pose.source = table",
}
GUIDED: tuple[Recipe, ...] = ("guided",)
POSED: tuple[Recipe, ...] = ("guided", "poses")
AUTOENCODER: tuple[Recipe, ...] = ("autoencoder",)
PAPER: tuple[Recipe, ...] = ("paper",)
EM: tuple[Recipe, ...] = ("guided", "poses", "autoencoder")
GRADIENT: tuple[Recipe, ...] = ("paper", "known", "table")
VARIED: tuple[Recipe, ...] = ("guided", "poses", "known")
STEPS: tuple[Recipe, ...] = ("autoencoder", "paper", "known", "table")
ENCODER: tuple[Recipe, ...] = ("autoencoder", "paper")


#: Names of point groups, in capitals; axes as RELION's.
POINT_GROUP = re.compile(r"[CD][1-9][0-9]{0,3}|T|O|I[1-4]?")


NO_WORDS: Mapping[str, Any] = MappingProxyType({})


def option(
    default: Any, help: str, recipes: tuple[Recipe, ...] = tuple(RECIPES), *, words: Mapping[str, Any] = NO_WORDS,
    **limits: float,
) -> Any:  # fmt: skip
    """A field with its default, one line of help, the recipes that read it, and its `least` and `most` value; `words`
    stand for values."""
    return field(default=default, metadata={"help": help, "recipes": recipes, "words": words, **limits})


def require(ok: bool, key: str, value: object, repair: str) -> None:
    """Refuse a value, with what to do about it, where something does not hold."""
    if not ok:
        raise ConfigError(f"config: {key} = {value!r}: {repair}")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings within the ranges that their fields give."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata.get("least"), f.metadata.get("most")
            within = (least is None or value >= least) and (most is None or value <= most)
            repair = f"must be at least {least}" if most is None else f"must lie between {least} and {most}"
            require(within, f"{section}.{f.name}", value, repair)


@dataclass(frozen=True, kw_only=True)
class PoseConfig(Section):
    """Where poses come from and how they are written."""

    source: PoseSourceName = option(
        "guided",
        "guided: search, local refinement and re-insertion; encoder: from the image alone; known: from the store; "
        "table: one free pose a particle",
    )
    parameterisation: Parameterisation = option("s2s2", "how a rotation is written", (*ENCODER, "table"))
    heads: int = option(0, "encoder heads; 0: 4 of encoder.network = circles, 1 of cnn", ENCODER, least=0, most=64)
    copies: int = option(
        0, "looks at each image: 2, 4: turned in the plane by equal angles; from 8 on half of them mirrored; the best "
        "one learns; 0: 16 of encoder.network = circles, 1 of cnn", ENCODER, least=0, most=64,
    )  # fmt: skip
    centred: bool = option(False, "particles sit at the centre; false: shifts are found too",
                           (*EM, "paper", "table"))  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.copies in (0, 1, 2, 4, 8, 16, 32, 64), "pose.copies", self.copies, "use a power of 2, or 0")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Section):
    """How encoder and map are learnt together, from random starts, at rising resolution."""

    starts: int = option(8, "random starts; the better half goes on after each round", AUTOENCODER, least=1)
    start_steps: int = option(80, "steps of each start in a round", AUTOENCODER, least=1)
    steps: int = option(600, "steps at the smallest level of the store", AUTOENCODER, least=1)
    level_steps: int = option(250, "steps at each larger level, up to train.box", AUTOENCODER, least=1)
    batch_size: int = option(64, "particles in a batch, over all workers", AUTOENCODER, least=1)
    remembered: int = option(
        2000, "particles that the running maps hold at first, by exponential decay", AUTOENCODER, least=128
    )
    search_radius: float = option(
        12.0, "Fourier pixels by which the best candidate is chosen", AUTOENCODER, least=2, most=64
    )
    refine: bool = option(False, "go on by the iterations of the refinement, as `guided` does", AUTOENCODER)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Section):
    """The network from image to pose."""

    network: Literal["circles", "cnn"] = option(
        "circles", "circles: a perceptron on circles in Fourier space; cnn: the paper's, on pixels", ENCODER
    )
    circles: int = option(10, "circles that it sees, Fourier pixels", ENCODER, least=2, most=28)
    hidden: int = option(0, "units of both fully connected layers; 0: 256 of circles, 512 of cnn", ENCODER, least=0)
    channels: tuple[int, ...] = option((32, 64, 128), "filters of the cnn's conv-conv-maxpool blocks", PAPER)
    input_box: int = option(0, "Fourier-crop the cnn's images to this box, px; 0: as trained", PAPER, least=0)
    precision: Literal["float32", "bfloat16"] = option("float32", "arithmetic of the convolutions", PAPER)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = len(self.channels) >= 1 and min(self.channels) >= 1
        require(blocks, "encoder.channels", self.channels, "name at least one block, each with 1 filter or more")
        even = self.input_box % 2 == 0
        require(even, "encoder.input_box", self.input_box, "must be even, or 0 for the training box")


@dataclass(frozen=True, kw_only=True)
class VolumeConfig(Section):
    """The shared map inside the decoder."""

    update: Literal["average", "gradient"] = option(
        "average", "average: running average of inserted images; gradient: voxels under Adam", AUTOENCODER
    )
    padding: float = option(2.0, "oversampling of the transform that is sliced: 1, 1.5 or 2", GRADIENT, least=1, most=4)
    gridding_correction: bool = option(True, "divide by the sinc squared of trilinear interpolation", GRADIENT)
    initial_scale: float = option(1.0, "uniform random start in [0, SCALE / box)", GRADIENT)
    kernels: KernelName = option(
        "auto", "what slices the map: auto: as --device; reference: plain torch; cpu: numba; cuda: Triton", GRADIENT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.initial_scale > 0, "volume.initial_scale", self.initial_scale, "must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Adam's learning rates, one for each kind of parameter."""

    encoder_rate: float = option(1e-3, "learning rate of the encoder", ENCODER, least=1e-12, most=10)
    volume_rate: float = option(
        0.1, "learning rate of the voxels, as a share of their start", STEPS, least=1e-12, most=10
    )
    table_rate: float = option(1e-2, "learning rate of the pose table", ("table",), least=1e-12, most=10)
    clip_norm: float = option(0.0, "clip the encoder's gradient norm here; 0: do not clip", PAPER, least=0)
    reduce_dtype: ReduceDtype = option("float32", "what gradients travel in between workers")
