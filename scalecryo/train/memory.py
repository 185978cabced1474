"""The memory that a run takes on a CPU, foreseen before it begins. Imports no torch.

Grids of the padded box are nearly all of it: the sums of both halves, the transforms that are sliced, and, while maps
are solved, half of a grid more (`map.backprojection`). Of a run on GPUs `sizing` says more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scalecryo.config import Config
from scalecryo.errors import ConfigError

PROCESS = 700 << 20  # Python, torch, numba and the package; measured
FINAL_BATCH = 256
COPIES_OF_IMAGES = 5  # single-precision arrays of a batch's pixels that stand at once; measured
FINAL_COPIES = 16  # of the final pass, which weights by the CTF on a padded box; measured
MARGIN = 1.05  # what the allocator keeps
RESULT_GRIDS = 24  # maps, masks, transforms and curves of one class, single precision, while results are written
SLABS = 256 << 20
POSING = 400 << 20  # scores and templates of a search, the encoder and its moments; measured at 64 and 128 px
SEARCH_LEVEL, PARTS = 64, 4
COMPONENT_LEVEL = 128  # box at which components are learnt, at most
SHELLS = 40  # bytes by which voxels of the grid are sorted into shells
STATES, STATE_SUMS = 20, 1 << 30  # at most; bytes of the sums that one pass makes of their maps
PARTS_OF_IMAGES = 256 << 20  # slices of a part of a batch, and what is made of them; measured
_GIB = 2**30
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Need:
    """Bytes of one process at its fullest moment.

    Attributes:
        training: of the stages before the final pass.
        final: of the final pass, at the store's full box; 0: there is none.
    """

    training: int
    final: int

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.training, self.final)


def grid(box: int) -> int:
    """Values of the padded half-complex grid of a box: 2 N × 2 N × (N + 1)."""
    return 4 * box * box * (box + 1)


def sums_bytes(box: int, maps: int) -> int:
    """Of so many maps: a complex numerator and a real denominator."""
    return maps * 12 * grid(box)


def need_of(config: Config, levels: Sequence[int]) -> Need:
    """What a run takes in each of its processes.

    Args:
        config: of the run.
        levels: boxes of the store, px.
    """
    full = max(levels)
    level, classes = config.train.box or full, config.foreseen_classes
    _, workers = config.run.worker_range
    read = config.stream.prefetch_mib << 20
    if config.recipe in ("guided", "poses"):
        batch = config.guided.batch_size // max(workers, 1)
        training = _refinement(level, classes, batch)
    elif config.recipe == "autoencoder":
        # Running sums and new ones, the sliced transforms, and what refreshes them; then a refinement, if wanted.
        training = 120 * grid(level) + _images(level, config.autoencoder.batch_size)
        if config.autoencoder.refine:
            training = max(training, _refinement(level, 1, config.guided.batch_size // max(workers, 1)))
    else:
        # Voxels, their gradient and moments; the sliced transform, its gradient, and what both are made with.
        training = 4 * 8 * level**3 + 4 * 8 * grid(level) + _images(level, config.train.batch_size)
    if not config.train.final_pass:
        return Need(_whole(read + training), 0)
    searching = config.recipe in ("guided", "poses", "autoencoder")
    found = 2 * 16 * grid(level) * classes + POSING if searching else 12 * grid(level)
    sums = sums_bytes(full, 2 * classes)
    posing = found + sums + max(_images(full, FINAL_BATCH, FINAL_COPIES), _solving(full, classes))
    writing = 4 * full**3 * (RESULT_GRIDS + 4 * classes)
    variety = _components(min(level, COMPONENT_LEVEL), level, config.train.components)
    return Need(_whole(read + training), _whole(read + max(posing, writing, variety)))


def _whole(held: int) -> int:
    return PROCESS + round(MARGIN * held)


def _components(low: int, full: int, count: int) -> int:
    """The largest of the passes that learn components, that place particles, and that make maps of states.

    Args:
        low: box that components are learnt at, at most.
        full: box of the states' maps.
        count: of components.
    """
    if not count:
        return 0
    channels, transforms = 2 * count + count * (count + 1) // 2, 8 * (count + 1)
    # Sums of both halves; then the transforms of both, or a copy of one, what is solved and each voxel's shell.
    learning = grid(low) * (2 * 4 * channels + max(2 * transforms, 4 * channels + 8 * count + SHELLS))
    placing = grid(low) * 3 * transforms  # of both halves, and of their mean
    maps = min(max(STATE_SUMS, sums_bytes(full, 2)), sums_bytes(full, 2 * STATES)) + grid(full) * 2 * transforms
    posing = grid(low) * 2 * transforms + POSING  # with the states of both halves that are searched
    return PARTS_OF_IMAGES + max(learning, placing, maps, posing)


def _refinement(level: int, classes: int, batch: int) -> int:
    """Sums, both halves' sliced transforms and the kernels' own copies of them, and a batch or a solution."""
    searched = sums_bytes(min(level, SEARCH_LEVEL), 2 * classes * PARTS)
    held = max(sums_bytes(level, 2 * classes), searched) + classes * 2 * 16 * grid(level)
    return POSING + held + max(_images(level, batch), _solving(level, classes))


def _images(level: int, batch: int, copies: int = COPIES_OF_IMAGES) -> int:
    return copies * 4 * batch * level * level


def _solving(level: int, classes: int) -> int:
    """Planes of one map, cropped along one axis, and the maps."""
    return 4 * grid(level) + 4 * level**3 * 2 * (classes + 2) + SLABS


def machine_bytes() -> int | None:
    """Memory of this machine, or of the container that this process is in; None where the system does not tell."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found += [
            int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal")
        ]
    for path in map(Path, _CGROUP):
        if path.exists() and (text := path.read_text().strip()).isdecimal():
            found.append(int(text))
    return min(found) if found else None


def check_memory(config: Config, levels: Sequence[int], machine: int | None) -> Need:
    """Refuse a run that this machine cannot hold, and say what would fit.

    Args:
        config: of the run; on GPUs, or on a cluster of other machines, nothing is refused.
        levels: boxes of the store, px.
        machine: bytes; None: not known.

    Raises:
        ConfigError: it takes more.
    """
    need, (low, _) = need_of(config, levels), config.run.worker_range
    if config.run.device == "cuda" or machine is None or max(low, 1) * need.peak <= machine:
        return need
    processes = f"{low} workers on it need" if low > 1 else "it needs"
    raise ConfigError(
        f"config: train.box = {config.train.box or max(levels)}: this machine has {machine / _GIB:.1f} GiB of memory "
        f"and {processes} about {max(low, 1) * need.peak / _GIB:.1f}: {_repair(config, levels, machine)}"
    )


def _repair(config: Config, levels: Sequence[int], machine: int) -> str:
    """The largest box that fits: of the training alone, or of the whole store."""
    workers = max(config.run.worker_range[0], 1)

    def fits(box: int, some: Sequence[int]) -> bool:
        smaller = replace(config, train=replace(config.train, box=box))
        return workers * need_of(smaller, some).peak <= machine

    smaller = [level for level in sorted(levels, reverse=True) if level < (config.train.box or max(levels))]
    for level in smaller:
        if fits(level, levels):
            return f"use --train.box {level}, or a machine with more"
    for level in smaller:
        if fits(0, [other for other in levels if other <= level]):
            return (
                f"the final pass is at the full box: convert once more with --box {level}, or use a machine with more"
            )
    return "use fewer workers or a machine with more" if workers > 1 else "use a machine with more"
