"""Whole runs: from a table of particles to the final map, beside what the CPU gave; and one iteration under torch's
profiler."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from scalecryo.commands import convert, evaluate, simulate, train
from scalecryo.config import config_from_dict
from scalecryo.data.storage.store import ParticleStore
from scalecryo.runs.folder import RunFolder
from scalecryo.train.loop import load_trained, run_stages
from scalecryo.train.stages.refinement import Refinement
from tools.gpu.session import Row, Session
from tools.gpu.timeline import timeline

#: SNR in dB and defocus in µm of the paper's datasets; what README has of them, one core of a CPU.
DATASETS: dict[str, tuple[float, tuple[float, float] | None, dict[str, str]]] = {
    "D": (0.0, None,
          {"seconds": "117–189", "FSC 0.5, Å": "1.72", "FSC 0.143, Å": "1.61", "pose error, °": "0.17–0.19"}),
    "G": (0.0, (0.4, 1.2),
          {"seconds": "102–209", "FSC 0.5, Å": "1.65", "FSC 0.143, Å": "1.61", "pose error, °": "0.11–0.13"}),
}  # fmt: skip
GOAL_SECONDS = {"D": 20, "80S, 256 px": 180}
RESULTS = {"fsc_0.5_angstrom": "FSC 0.5, Å", "fsc_0.143_angstrom": "FSC 0.143, Å",
           "rotation_error_mod_pseudosymmetry_median_deg": "pose error, °", "shift_error_median_px": "shift error, px",
           "fsc_mean": "mean FSC"}  # fmt: skip


def _simulated(folder: Path, structure: str, **wanted: Any) -> float:
    """Particles with their truth, made once; seconds."""
    if (folder / "particles.star").exists():  # the last file of a simulation
        return 0.0
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    simulate.run(structure, str(folder), astigmatism_um=0.0, seed=0, **wanted)
    return time.monotonic() - start


def _run(session: Session, name: str, folder: Path, settings: dict[str, str]) -> Iterator[Row]:
    """Convert, train and evaluate; what it came to, and where the time went."""
    data, store, out = folder / "particles", folder / "store.zarr", folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    table = data / f"{session.sizes.table}.star"
    convert.run(str(table), str(store), data_dir=None, box=None, dtype="float16", workers=8, overwrite=True,
                invert=False, uninvert=True)  # fmt: skip
    converted = time.monotonic()
    train.run(None, data=str(store), out=str(out), workers="0", device=session.device.type, resume=False,
              overrides=settings | dict(session.sizes.settings))  # fmt: skip
    ended = time.monotonic()
    found = evaluate.run(str(out), truth=str(data))
    row: Row = {"set": name, "device": session.device.type, "convert, s": round(converted - start, 1),
                "train, s": round(ended - converted, 1), "seconds": round(ended - start, 1)}  # fmt: skip
    row |= {title: _short(found.get(key)) for key, title in RESULTS.items()}
    yield row | {"goal, s": None if session.rehearsal else GOAL_SECONDS.get(name)}
    parts = {"convert": converted - start, **_parts(out)}
    for part, seconds in parts.items():
        yield {"set": name, "part": part, "seconds": round(seconds, 2)}
    rest = "the rest: start, final pass, results"
    yield {"set": name, "part": rest, "seconds": round(ended - start - sum(parts.values()), 2)}


def _short(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def _parts(out: Path) -> dict[str, float]:
    """Seconds by part of the work, as the run's last curves have them: up to the end of its last iteration."""
    found: dict[str, float] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found |= {key.removeprefix("seconds/"): entry[key] for key in entry if key.startswith("seconds/")}
    return found


def dataset(session: Session, name: str) -> Iterator[Row]:
    """One of the paper's datasets: 9,000 particles to train on, 1,000 held out."""
    sizes, (snr_db, defocus_um, cpu) = session.sizes, DATASETS[name]
    if name not in sizes.datasets:
        yield {"set": name, "device": "left out of the rehearsal: the same code as the other set"}
        return
    folder = session.work / name
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        taken = _simulated(folder / "particles", str(structure), n=sizes.particles, box=sizes.box, shift_a=0.0,
                           pixel_size=sizes.pixel_size, snr_db=snr_db, defocus_um=defocus_um)  # fmt: skip
    yield {"set": name, "part": "simulation, not counted", "seconds": round(taken, 1)}
    settings = {"pose.centred": "true", "train.rows": str(sizes.particles * 9 // 10)}
    yield from _run(session, name, folder, settings)
    known = {"set": name, "device": "CPU, one core (README)", **cpu}
    columns = ("set", "device", "convert, s", "train, s", "seconds", *RESULTS.values(), "goal, s")
    yield {column: known.get(column) for column in columns}


def dataset_d(session: Session) -> Iterator[Row]:
    """Dataset D: 0 dB, no CTF."""
    return dataset(session, "D")


def dataset_g(session: Session) -> Iterator[Row]:
    """Dataset G: 0 dB, CTF."""
    return dataset(session, "G")


def ribosome(session: Session) -> Iterator[Row]:
    """80S ribosome, 256 px of 1.4 Å, −10 dB, CTF, unknown shifts of 4 Å."""
    name, count, structure = "80S, 256 px", session.sizes.large, session.structure
    if not count or structure is None:
        why = "left out of the rehearsal" if not count else "no structure: --structure 6zu5.cif.gz"
        yield {"set": name, "device": why}
        return
    folder = session.work / "ribosome"
    taken = _simulated(folder / "particles", str(structure), n=count, box=256, pixel_size=1.4, snr_db=-10.0,
                       defocus_um=(0.8, 2.0), shift_a=4.0)  # fmt: skip
    yield {"set": name, "part": "simulation, not counted", "seconds": round(taken, 1)}
    yield from _run(session, name, folder, {})


def iteration(session: Session) -> Iterator[Row]:
    """One iteration of dataset D's refinement at its last radius: once to warm up, once, and once under the profiler.

    Every particle starts from its pose of the finished run; local refinement, insertion, encoder and reduction, no
    search.
    """
    finished = session.work / "D" / "run"
    if not (finished / "map.mrc").exists():
        yield {"what": "dataset D has no finished run here: its part comes first"}
        return
    copy = session.work / "iteration"
    for number in range(3):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy)
        folder = RunFolder(str(copy))
        config = folder.config()
        store = ParticleStore.open(config.run.data)
        context, learned = load_trained(config, store, folder, session.device, same_store=True)
        stage = _OneIteration(replace(context, config=_from_poses(config)), learned)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.on_gpu
        watch = profile(activities=kinds) if number == 2 else contextlib.nullcontext()
        session.wait()
        with watch as seen:
            start = time.perf_counter()
            run_stages([stage], context)
            session.wait()
            seconds = time.perf_counter() - start
        if not number:
            continue
        kind = "under the profiler" if number == 2 else "without the profiler"
        yield {"what": f"one iteration, {kind}, s", "value": round(seconds, 3)}
        yield {"what": f"images/s, {kind}", "value": round(context.count / seconds)}
        if seen is not None:
            yield from timeline(seen, seconds, on_gpu=session.on_gpu)
    folder.close()


def _from_poses(config: Any) -> Any:
    """The run's settings, but that poses are known and nothing is searched."""
    values = asdict(config)
    values["guided"]["start"] = "poses"
    return config_from_dict(values)


class _OneIteration(Refinement):
    """The refinement, ended after its first pass."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._passes = 0

    def request(self) -> Any:
        self._passes += 1
        return super().request()

    def done(self) -> bool:
        return self._passes > 0
