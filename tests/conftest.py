"""Fixtures shared by every test."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It reads this when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files and outside oracles, used in place; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of reference data at {folder}: it is kept beside the checkout, not in it")
    return folder


@dataclass(frozen=True)
class SimulatedParticles:
    """A small simulated set: folder with truth, a store without poses and one with them."""

    folder: Path
    store: str
    posed_store: str
    count: int
    box_size: int


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> SimulatedParticles:
    """300 noise-free projections of 4AKE, 32 px of 3.2 Å, with CTF and shifts, converted with and without poses."""
    from scalecryo.commands import convert, simulate

    folder = tmp_path_factory.mktemp("simulated")
    data, count, box_size = folder / "data", 300, 32
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(data), n=count, box=box_size, pixel_size=3.2, snr_db=10.0,
                     defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=3.0, seed=1)  # fmt: skip
    stores = []
    for table in ("particles", "truth"):
        store = str(folder / f"{table}.zarr")
        convert.run(str(data / f"{table}.star"), store, data_dir=None, box=None, dtype="float16", workers=2,
                    overwrite=False, invert=False, uninvert=True)  # fmt: skip
        stores.append(store)
    return SimulatedParticles(data, *stores, count, box_size)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster of two CPUs for the whole session: starting it takes tens of seconds."""
    import ray

    quiet = ray.LoggingConfig(log_level="ERROR")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_config=quiet)
    yield
    ray.shutdown()
