"""`scalecryo info`: what is at a path: a store, a run, a particle table, a stack or a map."""

import json

from scalecryo.commands.console import say
from scalecryo.data.conversion.report import report_lines
from scalecryo.data.formats import cryosparc, relion
from scalecryo.data.formats.mrc import Stack
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.storage.store import REPORT, ParticleStore, read_attributes
from scalecryo.errors import InputError, MissingInputError, UsageError
from scalecryo.runs.folder import RunFolder

_RUN_FILES = ("map.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "particles.star", "fsc.csv", "report.html")


def run(path: str, *, plan: bool = False, gpus: int = 8, gpu: str = "H100") -> None:
    """Describe what is there in a few lines; of a store also what a run on so many GPUs is predicted to take.

    Raises:
        UsageError: a plan of what is no store, or for no GPU.
        InputError, MissingInputError: nothing that can be described.
    """
    if plan:
        _plan(path, gpus, gpu)
        return
    if path.lower().endswith(".star"):
        _table(path, relion.read_particles(path))
    elif path.lower().endswith((".cs", ".csg")):
        _table(path, cryosparc.read_particles(path))
    elif read_attributes(path):
        _store(path)
    elif urls.is_folder(path):
        if urls.exists(urls.join(path, "config.toml")):
            _run(path)
        else:
            raise InputError(f"{urls.redacted(path)}: this folder is neither a particle store nor a run")
    elif not urls.exists(path):
        raise MissingInputError(f"{urls.redacted(path)}: no such file or folder")
    else:
        _images(path)


def _plan(path: str, gpus: int, gpu: str) -> None:
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: give at least 1")
    if not read_attributes(path):
        raise UsageError(f"{urls.redacted(path)}: --plan needs a particle store: `scalecryo convert` makes one")
    # torch takes seconds to import.
    from scalecryo.config import GuidedConfig
    from scalecryo.train.cost_model import A100, H100
    from scalecryo.train.sizing import plan, plan_lines

    _store(path)
    store, settings = ParticleStore.open(path, require_complete=False), GuidedConfig()
    made = plan(
        store.count, store.box_size, gpus, {"H100": H100, "A100": A100}[gpu],
        iteration_particles=settings.iteration_particles, batch_size=max(settings.batch_size, gpus),
    )  # fmt: skip
    say("  a guided run, predicted by a model that was never measured on a GPU:")
    for line in plan_lines([made]):
        say(f"  {line}")


def _table(path: str, table: ParticleTable) -> None:
    columns = table.columns
    say(f"{urls.redacted(path)}: {len(table):,} particles in {len(set(table.stacks))} stacks")
    say(f"  pixel size {table.pixel_size:.4g} Å" if table.pixel_size else "  no pixel size")
    if table.has_ctf and len(table):
        low, high = columns["defocus_v"].min() / 1e4, columns["defocus_u"].max() / 1e4
        voltages = ", ".join(f"{voltage:g}" for voltage in sorted(set(columns["voltage"].tolist())))
        say(f"  CTF: defocus {low:.2f} to {high:.2f} µm, {voltages} kV")
    else:
        say("  no CTF")
    say("  poses" if table.has_pose else "  no poses")
    halves = [int((columns["half"] == half).sum()) for half in (1, 2)]
    if any(halves):
        say(f"  halves: {halves[0]:,} and {halves[1]:,}")


def _images(path: str) -> None:
    stack = Stack.open(path)
    size = f"{stack.pixel_size:g} Å" if stack.pixel_size else "no pixel size in the header"
    cube = stack.count == stack.ny == stack.nx
    what = f"map of {stack.nx}³ voxels" if cube else f"{stack.count:,} images of {stack.ny} × {stack.nx} pixels"
    say(f"{urls.redacted(path)}: {what}, {size}")


def _store(path: str) -> None:
    store = ParticleStore.open(path, require_complete=False)
    attrs = store.attrs
    state = "complete" if attrs.get("complete") is True else "NOT complete: run the same `scalecryo convert` again"
    size = sum(level * level for level in store.levels) * store.count * (2 if store.dtype == "float16" else 4)
    say(f"{urls.redacted(path)}: particle store, {state}")
    say(f"  {store.count:,} particles, box {store.box_size} px, {store.pixel_size:.4g} Å/px, {store.dtype}")
    say(f"  levels {', '.join(map(str, store.levels))} px; {size / 1e9:.3g} GB of images")
    blocks = ", ".join(str(store.block_rows(level)) for level in store.levels)
    say(f"  {store.shards:,} shards of {store.shard_rows:,} particles; blocks of {blocks}")
    say(f"  normalisation {attrs['normalisation']}, {store.contrast}{', turned' if attrs['sign'] < 0 else ''}")
    aberrations = ", aberrations" if store.has_aberrations else ""
    say(f"  {'CTF' if store.has_ctf else 'no CTF'}{aberrations}, {'poses' if store.has_pose else 'no poses'}")
    say(f"  from {attrs['source']}")
    for added in attrs.get("appended", []):
        say(f"  and {added['count']:,} particles from {added['source']}")
    if store.levels:
        _memory(store)
    try:
        report = json.loads(urls.read_bytes(urls.join(path, REPORT)))
    except MissingInputError:
        return
    for line in report_lines(report):
        say(f"  {line}")


def _memory(store: ParticleStore) -> None:
    """What a run with the default settings takes, and what this machine has."""
    from scalecryo.config import Config
    from scalecryo.train.memory import machine_bytes, need_of

    need, machine = need_of(Config(), store.levels).peak, machine_bytes()
    here = f"; this machine has {machine / 2**30:.1f}" if machine else ""
    say(f"  `train` on a CPU takes about {need / 2**30:.1f} GiB of memory, recipe guided{here}")


def _run(path: str) -> None:
    present = [name for name in _RUN_FILES if urls.exists(urls.join(path, name))]
    say(f"{urls.redacted(path)}: run, {'finished' if len(present) == len(_RUN_FILES) else 'not finished'}")
    if urls.exists(urls.join(path, "map_unsharpened.mrc")):  # older runs have none
        present.insert(1, "map_unsharpened.mrc")
    if present:
        say(f"  holds {', '.join(present)}")
    rows = RunFolder(path).metrics()
    if rows:
        say("  last line of metrics: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if "map.mrc" in present:
        _images(urls.join(path, "map.mrc"))
