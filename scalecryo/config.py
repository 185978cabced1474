"""Configuration: a TOML file, then `--section.key value`, into frozen dataclasses that check themselves.

Each field is its own documentation: its help, and the recipes that read it. A setting that the recipe does not read is
refused where somebody gave it. Imports no torch, so help texts answer at once.
"""

import difflib
import json
import operator
import tomllib
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from scalecryo.errors import ConfigError
from scalecryo.settings import (
    EM,
    GRADIENT,
    GUIDED,
    POINT_GROUP,
    POSED,
    RECIPES,
    STEPS,
    VARIED,
    AutoencoderConfig,
    Device,
    EncoderConfig,
    OptimConfig,
    PoseConfig,
    Recipe,
    Section,
    VolumeConfig,
    option,
    require,
)

RENAMED = {  # settings, from their old names
    "guided.rungs": "guided.iterations",
    "guided.seeds": "guided.starts",
    "guided.search_rungs": "guided.search_iterations",
    "guided.settled_rungs": "guided.settled_iterations",
    "guided.rung_batch": "guided.batch_size",
    "guided.rung_particles": "guided.iteration_particles",
    "guided.lessons": "guided.encoder_steps",
    "guided.lesson_size": "guided.encoder_batch",
    "optim.traffic": "optim.reduce_dtype",
    "pose.symmetric_loss": "pose.copies",
    "stream.patience_seconds": "stream.retry_seconds",
    "train.assign": "train.final_pass",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """What a run reads, where it writes and on what it runs."""

    data: str = option("", "particle store, any fsspec URL")
    out: str = option("", "folder of the run, any fsspec URL; must not exist (or --resume)")
    workers: str = option("0", "0: this process, no Ray; N or MIN:MAX: Ray Train workers")
    device: Device = option("cpu", "what tensors live on")
    max_failures: int = option(3, "lost workers or nodes in a row, without a new checkpoint, that end a run", least=0)
    wait_minutes: float = option(0.0, "how long to wait for missing nodes at the start; 0: refuse at once", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.worker_range  # which checks them

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers; (0, 0) is this process alone."""
        low, _, high = self.workers.partition(":")
        numbers = [int(text) for text in (low, high or low) if text.isdecimal()]
        good = len(numbers) == 2 and (0 < numbers[0] <= numbers[1] or numbers == [0, 0])
        require(good, "run.workers", self.workers, "use 0, N >= 1, or MIN:MAX with 1 <= MIN <= MAX")
        return numbers[0], numbers[1]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long and on what to train."""

    steps: int = option(10_000, "number of optimiser steps", GRADIENT, least=1)
    batch_size: int = option(32, "particles in a global batch, over all workers", GRADIENT, least=1)
    box: int = option(0, "level of the store to train on, px; 0: the full box", least=0)
    rows: int = option(0, "train on the first ROWS particles and hold out the others; 0: all", least=0)
    half: int = option(0, "train on this half of the store alone, 1 or 2; 0: both", least=0, most=2)
    optics_group: int = option(-1, "train on this optics group alone; -1: all", least=-1)
    index: str = option("", "train on the rows that this file lists: .txt (one a line, from 0) or .npy; any fsspec URL")
    query: str = option("", "train on rows for which this holds, such as `defocus_u < 20000 and optics_group != 3`")
    mask: str = option("", "soft mask (.mrc, values 0 to 1) of references, FSC and map; default: made from the map")
    diameter_a: float = option(0.0, "diameter of the particle, Å: references end in a soft sphere; 0: none", least=0)
    symmetry: str = option(
        "C1", "point group: C7, D7, T, O, I, I1 to I4, about RELION's axes, which are found in the first map", POSED
    )
    classes: int = option(
        1, "structures that the particles are sorted into; auto (0): many cheap starts find how many there are", POSED,
        words={"auto": 0}, least=0, most=64,
    )  # fmt: skip
    class_mode: Literal["independent", "docked"] = option(
        "independent", "independent: unrelated structures, each from random poses; docked: one assembly in several "
        "compositions or conformations, told apart at the poses of one common map", GUIDED,
    )  # fmt: skip
    components: int = option(
        0, "directions of continuous variety that are learnt at the final poses; 0: none", VARIED, least=0, most=10
    )
    seed: int = option(0, "seed of the start, the sample order and the noise", least=0)
    checkpoint_every: int = option(500, "steps between checkpoints", STEPS, least=1)
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep", least=1)
    final_pass: bool = option(True, "end by assigning a pose to every particle and writing the maps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.box % 2 == 0, "train.box", self.box, "boxes are even: choose a level of the store")
        known = POINT_GROUP.fullmatch(self.symmetry.strip().upper()) is not None
        require(known, "train.symmetry", self.symmetry, "no such point group: use C1, C7, D7, T, O, I or I1 to I4")
        alone = not self.components or (self.classes == 1 and self.symmetry.strip().upper() == "C1")
        repair = "components are of one structure in C1 (a symmetric one: `select --expand`, guided.start = poses)"
        require(alone, "train.components", self.components, repair)
        require(not self.components or self.final_pass, "train.components", self.components, "needs train.final_pass")
        alone = self.classes != 0 or self.class_mode == "independent"
        require(alone, "train.class_mode", self.class_mode, "--classes auto finds independent structures: say how many")

    @property
    def several(self) -> bool:
        """Whether there may be more than one structure."""
        return self.classes != 1


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(Section):
    """The guided method: bootstrap from random poses, then frequency marching by streamed passes."""

    start: Literal["nothing", "poses"] = option(
        "nothing", "nothing: random poses; poses: those that came with the particles, refined without a search", EM
    )
    starts: int = option(2, "random starts of the bootstrap; held-out likelihood picks the best", GUIDED, least=1)
    bootstrap_steps: int = option(
        60, "batches that each round of the bootstrap learns from; rounds go on until the halves agree", GUIDED, least=1
    )
    bootstrap_rounds: int = option(20, "most rounds of the bootstrap, which ends sooner as a rule", GUIDED, least=1)
    ensemble_classes: tuple[int, ...] = option((4, 8, 16), "classes of the cheap starts of --classes auto", GUIDED)
    ensemble_starts: int = option(4, "cheap starts of --classes auto with each of these numbers", GUIDED, least=1)
    ensemble_steps: int = option(50, "batches that each of them learns from", GUIDED, least=2)
    bootstrap_batch: int = option(100, "particles in its batches, over both halves and all workers", GUIDED, least=1)
    shift_radius_a: float = option(
        0.0,
        "largest shift searched, Å; 0: 5 % of the box (at least 12), up to 20 % where particles lie farther off",
        EM,
        least=0,
    )
    iterations: int = option(20, "most iterations of the refinement", EM, least=1)
    search_iterations: int = option(8, "most of them that search all rotations, while particles jump", GUIDED, least=0)
    settled_iterations: int = option(1, "iterations without progress that end the refinement", EM, least=1)
    batch_size: int = option(1024, "particles in a batch of the refinement, over all workers", EM, least=1)
    iteration_particles: int = option(50_000, "particles that an iteration reads at most", EM, least=1)
    encoder_steps: int = option(2, "steps of the encoder for each batch of the refinement; 0: none", EM, least=0)
    encoder_batch: int = option(256, "real particles in such a step, with as many projections of the map", EM, least=1)
    encoder_hidden: int = option(1024, "units in each hidden layer of the grid encoder", EM, least=1)
    encoder_rate: float = option(1e-3, "learning rate of the grid encoder", EM, least=1e-7)

    def __post_init__(self) -> None:
        super().__post_init__()
        within = len(self.ensemble_classes) > 0 and all(2 <= classes <= 64 for classes in self.ensemble_classes)
        require(within, "guided.ensemble_classes", self.ensemble_classes, "name numbers of 2 to 64 classes")
        enough = len(self.ensemble_classes) * self.ensemble_starts >= 3
        require(enough, "guided.ensemble_starts", self.ensemble_starts, "fewer than three starts in all say nothing")


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Section):
    """How particles stream from the store; memory is lanes x window_blocks x one block, and what is read ahead."""

    lanes: int = option(32, "independent reading lanes; at least the largest number of workers", least=1)
    window_blocks: int = option(4, "blocks that a lane shuffles together", least=1)
    threads: int = option(0, "reading threads in each worker; 0: 4 for files, 12 for object storage", least=0)
    prefetch_mib: int = option(256, "most that a worker reads ahead, MiB; at least one window", least=1)
    retry_seconds: float = option(120.0, "how long a request to an object store may keep failing", least=0)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """What a run reports while it trains."""

    every: int = option(20, "steps between scalars", STEPS, least=1)
    pictures_every: int = option(200, "steps between pictures, FSC and pose errors", STEPS, least=1)
    truth: str = option("", "folder with truth.star and truth.mrc, to follow errors of a simulation")
    prometheus: str = option("", "local file, *.prom, that gets the run's figures for node_exporter; Ray has its own")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _, high = self.run.worker_range
        settings = settings_of(self)
        for key in ("stream.lanes", "train.batch_size", "guided.batch_size", "guided.bootstrap_batch",
                    "autoencoder.batch_size"):  # fmt: skip
            value = settings.get(key, high)
            require(high <= value, key, value, f"must be at least the number of workers ({high})")
        turned = self.encoder.network == "circles" or self.copies <= 8
        require(turned, "pose.copies", self.copies, "the cnn turns images by 90 degrees: use 1, 2, 4 or 8")
        found = self.train.classes != 0 or self.recipe == "guided"
        repair = f"only the recipe guided ({RECIPES['guided']}) finds how many: say how many"
        require(found, "train.classes", "auto", repair)
        fits = not self.train.box or self.encoder.input_box <= self.train.box
        require(fits, "encoder.input_box", self.encoder.input_box, f"must not exceed train.box ({self.train.box})")

    @property
    def recipe(self) -> Recipe:
        """What pose.source and guided.start choose."""
        if self.pose.source == "guided":
            return "guided" if self.guided.start == "nothing" else "poses"
        if self.pose.source == "encoder":
            return "autoencoder" if self.encoder.network == "circles" else "paper"
        return self.pose.source

    @property
    def foreseen_classes(self) -> int:
        """How many structures time and memory are foreseen for: where it is found, the fewest of any start."""
        return self.train.classes or min(self.guided.ensemble_classes)

    @property
    def heads(self) -> int:
        """What `pose.heads` comes to."""
        return self.pose.heads or (4 if self.encoder.network == "circles" else 1)

    @property
    def copies(self) -> int:
        """What `pose.copies` comes to."""
        return self.pose.copies or (16 if self.encoder.network == "circles" else 1)

    @property
    def hidden(self) -> int:
        """What `encoder.hidden` comes to."""
        return self.encoder.hidden or (256 if self.encoder.network == "circles" else 512)


# `f.type` is a type, not its name, as long as this module does not postpone the evaluation of annotations.
SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(Config)}
SETTINGS = {f"{section}.{f.name}": f for section, kind in SECTIONS.items() for f in fields(kind)}


def load_config(path: str | None, overrides: Mapping[str, Any], *, base: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file (or none), apply overrides, and check everything.

    Args:
        path: the TOML file, or None to start from `base`, or from the defaults.
        overrides: by `section.key`; a text stands for what it means in TOML, lists without their brackets.
        base: nested values to start from where there is no file; the recipe need not read them.

    Raises:
        ConfigError: unreadable TOML; a setting that is unknown, of a wrong type or value, or not read by the recipe.
    """
    given = {} if path is None else _flat(_read_toml(path))
    for name, value in overrides.items():
        dotted = name.replace("-", "_")
        given[dotted] = _from_text(value, _field(dotted).type) if isinstance(value, str) else value
    config = _build(given if path is not None else {**_flat(base or {}), **given})
    for dotted in given:
        readers = SETTINGS[dotted].metadata["recipes"]
        if config.recipe not in readers:
            others = " or ".join(f"{recipe} ({RECIPES[recipe]})" for recipe in readers)
            raise ConfigError(
                f"config: {dotted} is not read by the recipe {config.recipe} ({RECIPES[config.recipe]}): leave it out, "
                f"or choose {others}"
            )
    return config


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings, refusing unknown names and wrong types.

    Raises:
        ConfigError: as `load_config`; keys that the recipe does not read are let pass.
    """
    return _build(_flat(values))


def settings_of(config: Config) -> dict[str, Any]:
    """What the recipe reads, by `section.key`."""
    read = (name for name, f in SETTINGS.items() if config.recipe in f.metadata["recipes"])
    return {name: operator.attrgetter(name)(config) for name in read}


def flat_settings(config: Config) -> dict[str, bool | int | float | str]:
    """What the recipe reads, by `section.key`, lists as text."""
    return {name: str(value) if isinstance(value, tuple) else value for name, value in settings_of(config).items()}


def config_to_toml(config: Config) -> str:
    """What the recipe reads as TOML text; `load_config` reads back the same Config."""
    lines: list[str] = []
    for dotted, value in settings_of(config).items():
        section, _, key = dotted.partition(".")
        if f"[{section}]" not in lines:
            lines += ["", f"[{section}]"]
        words = {number: word for word, number in SETTINGS[dotted].metadata["words"].items()}
        value = words.get(value, value) if words else value
        # JSON's texts, lists and truth values are TOML's, but not its infinity.
        text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{key} = {text}")
    return "\n".join([*lines[1:], ""])


def describe_run(config: Config) -> str:
    """The configuration as a Markdown code block, for TensorBoard's text page."""
    return "".join(f"    {line}\n" for line in config_to_toml(config).splitlines())


def refuse_renamed(dotted: str) -> None:
    """Raise a ConfigError with the new name, where `section.key` is an old one."""
    if dotted in RENAMED:
        raise ConfigError(f"config: {dotted} was renamed to {RENAMED[dotted]}")


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist: check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {path} cannot be read as TOML: {error}") from None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by `section.key`."""
    for section, table in values.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"config: [{section}] = {table!r}: must be a section with keys")
    return {f"{section}.{key}": value for section, table in values.items() for key, value in table.items()}


def _build(given: Mapping[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {}
    for dotted, value in given.items():
        section, _, key = dotted.partition(".")
        tables.setdefault(section, {})[key] = _convert(value, _field(dotted).type, dotted)
    return Config(**{section: SECTIONS[section](**table) for section, table in tables.items()})


def _field(dotted: str) -> Any:
    """The field of a setting, which must exist."""
    refuse_renamed(dotted)
    if (section := dotted.partition(".")[0]) not in SECTIONS:
        raise ConfigError(f"config: unknown section [{section}]{_nearest(section, SECTIONS)}")
    if dotted not in SETTINGS:
        raise ConfigError(f"config: unknown key {dotted}{_nearest(dotted, SETTINGS)}")
    return SETTINGS[dotted]


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(sorted(known))}"


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Check a value against the field's type; whole numbers may stand for floats, lists for tuples, and words."""
    words = SETTINGS[key].metadata["words"]
    if isinstance(value, str) and value in words:
        return words[value]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        require(value in choices, key, value, f"choose one of {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        whole = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        require(whole, key, value, "must be a list of whole numbers")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    repair = "write true or false" if kind is bool else f"must be of type {kind.__name__}"
    require(type(value) is kind, key, value, f"{repair}{''.join(f', or {word}' for word in words)}")
    return value


def _from_text(text: str, kind: Any) -> Any:
    """What a text means for a type; the text itself where it means nothing, for `_convert` to refuse."""
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    literal = f"[{text.strip('[]()')}]" if typing.get_origin(kind) is tuple else text.lower()
    try:
        return tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        return text
