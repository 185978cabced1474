"""Configuration: a TOML file, then `--section.key value`, into frozen dataclasses that check themselves.

Each field is its own documentation: `describe()` makes the help text of `scalecryo train` from them.
Imports no torch, so help texts answer at once.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from scalecryo.errors import ConfigError

Device = Literal["cpu", "cuda"]
PoseSourceName = Literal["guided", "encoder", "known", "table"]
Parameterisation = Literal["s2s2", "quaternion", "euler"]
ReduceDtype = Literal["float32", "bfloat16"]
KernelName = Literal["auto", "reference", "cpu", "cuda"]


def option(default: Any, help: str) -> Any:
    """A configuration field with its default and one line of help."""
    return field(default=default, metadata={"help": help})


def _require(ok: bool, key: str, value: object, repair: str) -> None:
    if not ok:
        raise ConfigError(f"config: {key} = {value!r}: {repair}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run reads, where it writes and on what it runs: --data, --out, --workers, --device."""

    data: str = option("", "particle store, any fsspec URL")
    out: str = option("", "folder of the run, any fsspec URL")
    workers: str = option("0", "0: this process, no Ray; N or MIN:MAX: Ray Train workers")
    device: Device = option("cpu", "cpu or cuda")
    max_failures: int = option(3, "lost workers or nodes in a row, without a new checkpoint, before a run gives up")
    wait_minutes: float = option(0.0, "how long to wait for missing nodes at the start; 0: refuse at once")

    def __post_init__(self) -> None:
        _require(self.max_failures >= 0, "run.max_failures", self.max_failures, "must be 0 or more")
        _require(self.wait_minutes >= 0, "run.wait_minutes", self.wait_minutes, "must be 0 or more")
        low, high = self.worker_range
        _require(0 <= low <= high and (low > 0 or high == 0), "run.workers", self.workers,
                 "use 0, N >= 1, or MIN:MAX with 1 <= MIN <= MAX")  # fmt: skip

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers; (0, 0) is this process alone."""
        low, _, high = self.workers.partition(":")
        try:
            return int(low), int(high or low)
        except ValueError:
            raise ConfigError(
                f"config: run.workers = {self.workers!r}: use 0, N, or MIN:MAX, all whole numbers"
            ) from None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and on what to train."""

    steps: int = option(10_000, "number of optimiser steps")
    batch_size: int = option(32, "particles in a global batch, over all workers")
    box: int = option(0, "level of the store to train on, px; 0: the full box")
    rows: int = option(0, "train on the first ROWS particles and hold out the others; 0: all")
    half: int = option(0, "train on this half of the store alone, 1 or 2; 0: both")
    optics_group: int = option(-1, "train on this optics group alone; -1: all")
    index: str = option("", "train on the rows that this file lists: .txt (one a line, from 0) or .npy; any fsspec URL")
    query: str = option("", "train on rows for which this holds, such as `defocus_u < 20000 and optics_group != 3`")
    seed: int = option(0, "seed of the start, the sample order and the noise")
    checkpoint_every: int = option(500, "steps between checkpoints")
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep")
    final_pass: bool = option(True, "end by assigning a pose to every particle and writing the maps")

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "must be at least 1")
        for key in ("box", "rows", "seed"):
            _require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "must not be negative")
        _require(self.box % 2 == 0, "train.box", self.box, "boxes are even: choose a level of the store")
        _require(self.half in (0, 1, 2), "train.half", self.half, "choose 1 or 2, or 0 for both")
        _require(self.optics_group >= -1, "train.optics_group", self.optics_group, "give a group, or -1 for all")


@dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Where poses come from and how they are written."""

    source: PoseSourceName = option(
        "guided",
        "guided: search, local refinement and re-insertion; encoder: from the image alone; known: from the store; "
        "table: one free pose a particle",
    )
    parameterisation: Parameterisation = option("s2s2", "how encoder and table write a rotation")
    heads: int = option(1, "encoder heads; the best one a particle learns (winner takes all)")
    symmetric_loss: bool = option(False, "also try the image turned by 180 degrees, keep the better")
    centred: bool = option(False, "particles sit at the centre; false: shifts are found too")

    def __post_init__(self) -> None:
        _require(1 <= self.heads <= 64, "pose.heads", self.heads, "must lie between 1 and 64")
        if self.source != "encoder":
            _require(self.heads == 1, "pose.heads", self.heads, f"pose.source = {self.source!r} has one head")
            _require(not self.symmetric_loss, "pose.symmetric_loss", True, "only with pose.source = 'encoder'")


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """The guided method: bootstrap from random poses, then frequency marching by streamed passes."""

    start: Literal["nothing", "poses"] = option(
        "nothing", "nothing: random poses; poses: those that came with the particles, refined without a search"
    )
    starts: int = option(2, "random starts of the bootstrap; held-out likelihood picks the best")
    bootstrap_steps: int = option(100, "batches that the bootstrap learns from")
    bootstrap_batch: int = option(400, "particles in a bootstrap batch, over both halves and all workers")
    shift_radius_a: float = option(12.0, "largest shift that is searched, Å; pose.centred = true: none")
    iterations: int = option(12, "most iterations of the refinement")
    search_iterations: int = option(8, "most iterations that search all rotations; fewer when particles stop jumping")
    settled_iterations: int = option(1, "iterations without progress after which the refinement ends")
    batch_size: int = option(1024, "particles in a batch of the refinement, over all workers")
    iteration_particles: int = option(50_000, "particles that an iteration reads at most")
    encoder_steps: int = option(2, "steps that the encoder learns for each batch of the refinement; 0: no encoder")
    encoder_batch: int = option(256, "real particles in a training step, beside as many projections of the map")
    encoder_hidden: int = option(1024, "units in each hidden layer of the grid encoder")
    encoder_rate: float = option(1e-3, "learning rate of the grid encoder")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):
                continue
            least = {"search_iterations": 0, "shift_radius_a": 0, "encoder_steps": 0, "encoder_rate": 1e-7}.get(
                f.name, 1
            )
            _require(value >= least, f"guided.{f.name}", value, f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network from image to pose."""

    channels: tuple[int, ...] = option((32, 64, 128), "filters of the conv-conv-maxpool blocks")
    hidden: int = option(512, "units in each of the two fully connected layers")
    input_box: int = option(0, "Fourier-crop the images to this box before the network, px; 0: as trained")
    precision: Literal["float32", "bfloat16"] = option("float32", "arithmetic of the convolutions")

    def __post_init__(self) -> None:
        _require(all(c >= 1 for c in self.channels) and len(self.channels) >= 1, "encoder.channels",
                 self.channels, "name at least one block, each with 1 filter or more")  # fmt: skip
        _require(self.hidden >= 1, "encoder.hidden", self.hidden, "must be at least 1")
        _require(self.input_box >= 0 and self.input_box % 2 == 0, "encoder.input_box", self.input_box,
                 "must be even, or 0 for the training box")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VolumeConfig:
    """The shared map inside the decoder."""

    padding: float = option(2.0, "oversampling of the transform that is sliced: 1, 1.5 or 2")
    gridding_correction: bool = option(True, "divide by the sinc squared of trilinear interpolation")
    initial_scale: float = option(1.0, "uniform random start in [0, SCALE / box)")
    kernels: KernelName = option(
        "auto", "what slices the map: auto: as --device; reference: plain torch; cpu: numba; cuda: Triton"
    )

    def __post_init__(self) -> None:
        _require(1.0 <= self.padding <= 4.0, "volume.padding", self.padding, "must lie between 1 and 4")
        _require(self.initial_scale > 0, "volume.initial_scale", self.initial_scale, "must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam's learning rates, one for each kind of parameter."""

    encoder_rate: float = option(1e-3, "learning rate of the encoder")
    volume_rate: float = option(0.1, "learning rate of the voxels, as a share of their starting scale")
    table_rate: float = option(1e-2, "learning rate of the pose table")
    clip_norm: float = option(0.0, "clip the encoder's gradient norm here; 0: do not clip")
    reduce_dtype: ReduceDtype = option("float32", "what gradients travel in between workers: float32 or bfloat16")

    def __post_init__(self) -> None:
        for key in ("encoder_rate", "volume_rate", "table_rate"):
            value = getattr(self, key)
            _require(0 < value < 10, f"optim.{key}", value, "a learning rate lies between 0 and 10")
        _require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How particles stream from the store; memory is lanes x window_blocks x one block, and what is read ahead."""

    lanes: int = option(32, "independent reading lanes; at least the largest number of workers")
    window_blocks: int = option(4, "blocks that a lane shuffles together")
    threads: int = option(0, "reading threads in each worker; 0: 4 for files, 12 for object storage")
    prefetch_mib: int = option(256, "most that a worker reads ahead, MiB; at least one window")
    retry_seconds: float = option(120.0, "how long a request to an object store may keep failing")

    def __post_init__(self) -> None:
        for key, least in {"lanes": 1, "window_blocks": 1, "threads": 0, "prefetch_mib": 1}.items():
            _require(getattr(self, key) >= least, f"stream.{key}", getattr(self, key), f"must be at least {least}")
        _require(self.retry_seconds >= 0, "stream.retry_seconds", self.retry_seconds, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a run reports while it trains."""

    every: int = option(20, "steps between scalars")
    pictures_every: int = option(200, "steps between pictures, FSC and pose errors")
    truth: str = option("", "folder with truth.star and truth.mrc, to follow errors of a simulation")

    def __post_init__(self) -> None:
        for key in ("every", "pictures_every"):
            _require(getattr(self, key) >= 1, f"monitor.{key}", getattr(self, key), "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _, high = self.run.worker_range
        lanes = self.stream.lanes
        _require(high <= lanes, "stream.lanes", lanes, f"must be at least the number of workers ({high})")
        _require(self.train.batch_size >= max(high, 1), "train.batch_size", self.train.batch_size,
                 f"must be at least the number of workers ({high})")  # fmt: skip
        if self.train.box and self.encoder.input_box:
            _require(self.encoder.input_box <= self.train.box, "encoder.input_box", self.encoder.input_box,
                     f"must not exceed train.box ({self.train.box})")  # fmt: skip


def load_config(path: str | None, overrides: Mapping[str, str], *, base: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file (or none), apply `section.key` overrides given as text, and check everything.

    Args:
        path: the TOML file, or None to start from `base`, or from the defaults.
        overrides: by `section.key`, each value as text.
        base: nested values to start from where there is no file.

    Raises:
        ConfigError: unreadable TOML, unknown section or key (with the nearest name), wrong type or value.
    """
    values: dict[str, Any] = dict(base or {})
    if path is not None:
        try:
            with open(path, "rb") as handle:
                values = tomllib.load(handle)
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist: check the path") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"config file {path} cannot be read as TOML: {error}") from None
    merged = {section: dict(table) if isinstance(table, Mapping) else table for section, table in values.items()}
    for dotted, text in overrides.items():
        section, _, key = dotted.replace("-", "_").partition(".")
        kind = _field_type(section, key)
        table = merged.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = _parse_text(text, kind, f"{section}.{key}")
    return config_from_dict(merged)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings, refusing unknown names and wrong types.

    Raises:
        ConfigError: as `load_config`.
    """
    sections = {f.name: f.type for f in fields(Config)}
    built = {}
    for section, table in values.items():
        if section not in sections:
            raise ConfigError(f"config: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, Mapping):
            raise ConfigError(f"config: {section} = {table!r}: write it as a section, [{section}]")
        kind = typing.get_type_hints(Config)[section]
        built[section] = kind(**{k: _convert(v, _field_type(section, k), f"{section}.{k}") for k, v in table.items()})
    return Config(**built)


def config_to_toml(config: Config) -> str:
    """The whole configuration as TOML text; `load_config` reads back the same Config."""
    lines = []
    for section, table in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in table.items())
        lines.append("")
    return "\n".join(lines)


def describe() -> list[tuple[str, str, str]]:
    """Every setting as (section.key, default, help), for help texts."""
    rows: list[tuple[str, str, str]] = []
    for section in fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        rows.extend(
            (f"{section.name}.{f.name}", _toml_value(f.default), f.metadata["help"])
            for f in fields(kind)
            if section.name != "run"
        )
    return rows


def flat_settings(config: Config) -> dict[str, bool | int | float | str]:
    """Every setting by `section.key`, lists as text."""
    tables = dataclasses.asdict(config)
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, table in tables.items()
        for key, value in table.items()
    }


def describe_run(config: Config) -> str:
    """The configuration as a Markdown code block, for TensorBoard's text page."""
    return "".join(f"    {line}\n" for line in config_to_toml(config).splitlines())


def _field_type(section: str, key: str) -> Any:
    hints = typing.get_type_hints(Config)
    if section not in hints:
        raise ConfigError(f"config: unknown section [{section}]{_nearest(section, hints)}")
    keys = typing.get_type_hints(hints[section])
    if key not in keys:
        dotted = {f"{s}.{f.name}" for s, kind in hints.items() for f in fields(kind)}
        raise ConfigError(f"config: unknown key {section}.{key}{_nearest(f'{section}.{key}', dotted)}")
    return keys[key]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(sorted(known))}"


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Check a TOML value against the field's type; whole numbers may stand for floats, lists for tuples."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        _require(value in choices, key, value, f"choose one of {', '.join(map(str, choices))}")
        return value
    if typing.get_origin(kind) is tuple:
        _require(isinstance(value, list | tuple) and all(type(v) is int for v in value), key, value,
                 "must be a list of whole numbers")  # fmt: skip
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    _require(type(value) is kind, key, value, f"must be of type {kind.__name__}")
    return value


def _parse_text(text: str, kind: Any, key: str) -> Any:
    """Turn an override's text into the field's type."""
    if kind is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        _require(text.lower() in known, key, text, "write true or false")
        return known[text.lower()]
    try:
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.strip("[]()").split(","))
    except ValueError:
        name = "whole numbers, separated by commas" if isinstance(kind, types.GenericAlias) else kind.__name__
        raise ConfigError(f"config: {key} = {text!r}: must be of type {name}") from None
    return text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return repr(value)
