"""What a verb's arguments name, looked at before the verb is imported: torch takes seconds, a wrong path should not.

Each check reads a few small files at most, and raises what the verb itself would.
"""

import math
from collections.abc import Sequence
from typing import Any

from scalecryo.data.conversion.places import check_destination, check_source
from scalecryo.data.io import urls
from scalecryo.data.simulation.hinge import Hinge
from scalecryo.data.simulation.settings import Imaging, Imperfections
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, OutputExistsError
from scalecryo.runs.folder import RunFolder

LEVEL = "iteration/level"  # of metrics.jsonl: box of an iteration's images and maps
SIMULATED = ("particles.mrcs", "particles.star", "truth.star")


def check_simulate(structure: str, out_dir: str, **asked: Any) -> None:
    """Refuse sources that are not there, outputs that are, and settings that contradict each other.

    Args:
        structure: a structure or map.
        out_dir: folder to write into.
        asked: the verb's options.

    Raises:
        MissingInputError, OutputExistsError, InputError: as said.
    """
    sources: Sequence[str] = (structure, *asked.get("mix", ()))
    for source in sources:
        urls.check_there(source)
    turns = None if asked.get("hinge") is None else Hinge.parse(asked["hinge"])
    kinds = len(sources) - 1 + (1 if turns is None else turns.steps)
    existing = [name for name in (*SIMULATED, *truth_maps(kinds)) if urls.exists(urls.join(out_dir, name))]
    if existing:
        raise OutputExistsError(
            f"{urls.redacted(out_dir)} already holds {existing[0]}: remove it, or name another folder"
        )
    if asked["n"] < 1:
        raise InputError(f"{asked['n']} particles cannot be simulated: ask for at least one")
    if asked["box"] < 2 or asked["box"] % 2:
        raise InputError(f"box size {asked['box']} px is not a positive even number: give an even box")
    snr_db = asked["snr_db"]
    if snr_db is not None and not math.isfinite(snr_db):
        raise InputError(f"a signal-to-noise ratio of {snr_db} dB means nothing: give a number, or leave it out")
    Imaging(*(asked[name] for name in ("pixel_size", "defocus_um", "astigmatism_um", "shift_a")))
    names = ("colour", "scale_sd", "gain_sd", "junk", "neighbours", "prefer", "defocus_error_a")
    wanted = Imperfections(**{name: asked[name] for name in names if name in asked})
    if wanted.colour > 0 and snr_db is None:
        raise InputError("coloured noise without noise means nothing: give a signal-to-noise ratio too")
    if wanted.defocus_error_a > 0 and asked["defocus_um"] is None:
        raise InputError("a defocus error without a CTF means nothing: give a defocus range too")
    if asked.get("micelle", 0) > 0 and asked.get("symmetry", "C1").strip().upper()[:1] not in ("C", "D"):
        raise InputError(f"a micelle about z has not the symmetry {asked['symmetry']}: leave one of the two out")


def truth_maps(sources: int) -> list[str]:
    """Names of the true maps of so many structures."""
    return ["truth.mrc", *(f"truth_{number}.mrc" for number in range(2, sources + 1))]


def check_convert(source: str, store: str, *, overwrite: bool, add: bool, **_: Any) -> None:
    """Refuse a source that is not there, and a destination that is.

    Raises:
        MissingInputError, InputError, OutputExistsError: as said.
    """
    check_source(source)
    if not add:
        check_destination(store, overwrite)


def check_verify(store: str, **_: Any) -> None:
    """Refuse what is no store."""
    ParticleStore.open(store)


def check_assign(run: str, *, data: str | None, **_: Any) -> None:
    """Refuse what is no run, or has no store; another store where its images are not of the run's pixels."""
    trained = RunFolder(run)
    config = trained.config()
    store = ParticleStore.open(data or config.run.data)
    levels = [row[LEVEL] for row in trained.metrics() if LEVEL in row]
    # The checkpoint knows it too, but only torch can read that. A run's own store may be gone by now.
    if data is not None and levels and urls.exists(config.run.data):
        level = int(levels[-1])
        store.check_images(level, ParticleStore.open(config.run.data).level_pixel_size(level))


def check_evaluate(path: str, *, truth: str, **_: Any) -> None:
    """Refuse a result or a truth that is not there."""
    for name in (path, truth):
        urls.check_there(name)
    if urls.is_folder(truth):
        urls.check_there(urls.join(truth, "truth.mrc"))
        if not path.lower().endswith((".mrc", ".map")):
            urls.check_there(urls.join(truth, "truth.star"))


def check_demo(*, out: str) -> None:
    """Refuse a folder that is there."""
    if urls.exists(out):
        raise OutputExistsError(f"{out} exists already: remove it, or name another folder with --out")
