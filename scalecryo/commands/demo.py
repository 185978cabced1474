"""`scalecryo demo`: the whole path on simulated adenylate kinase, in minutes, without a network."""

import time
from importlib.resources import as_file
from importlib.resources import files as package_files

from scalecryo.commands import convert, evaluate, simulate, train
from scalecryo.commands.console import note
from scalecryo.data import files
from scalecryo.errors import OutputExistsError

PARTICLES = 4000
BOX = 64
PIXEL_SIZE = 1.6


def run(*, out: str) -> None:
    """Simulate, convert, train, evaluate, and say what was reached and where it lies.

    Raises:
        OutputExistsError: the folder already exists.
    """
    if files.exists(out):
        raise OutputExistsError(f"{out} exists already: remove it, or name another folder with --out")
    start = time.monotonic()
    data, store, result = (files.join(out, name) for name in ("particles", "store.zarr", "run"))
    note(f"1/4 simulating {PARTICLES} particles of 4AKE (adenylate kinase), {BOX} px, {PIXEL_SIZE} Å/px")
    with as_file(package_files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), data, n=PARTICLES, box=BOX, pixel_size=PIXEL_SIZE, snr_db=None,
                     defocus_um=None, astigmatism_um=0.0, shift_a=0.0, seed=0)  # fmt: skip
    note("2/4 converting to a Zarr store")
    convert.run(files.join(data, "particles.star"), store, data_dir=None, box=None, dtype="float16", workers=2,
                overwrite=False, invert=False, uninvert=True)  # fmt: skip
    note("3/4 training from random poses")
    train.run(None, data=store, out=result, workers="0", device="cpu", resume=False,
              overrides=dict(RECIPE))  # fmt: skip
    note("4/4 evaluating against the truth")
    evaluate.run(result, truth=data)
