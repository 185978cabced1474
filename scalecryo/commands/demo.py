"""`scalecryo demo`: the whole path on simulated adenylate kinase, in minutes, without a network."""

import time
from importlib.resources import as_file
from importlib.resources import files as package_files

from scalecryo.commands import convert, evaluate, simulate, train
from scalecryo.commands.console import note, say
from scalecryo.data.io import urls

PARTICLES, BOX, PIXEL_SIZE, SNR_DB, SHIFT_A = 4000, 128, 0.8, 0.0, 1.6
DEFOCUS_UM = (0.4, 1.2)


def run(*, out: str) -> None:
    """Simulate, convert, train, evaluate, and say what was reached and where it lies.

    The folder must not exist (`arguments`).
    """
    start = time.monotonic()
    data, store, result = (urls.join(out, name) for name in ("particles", "store.zarr", "run"))
    note(
        f"1/4 simulating {PARTICLES:,} noisy particles of adenylate kinase (4AKE): {BOX} px of {PIXEL_SIZE} Å, "
        f"{SNR_DB:g} dB, defocus {DEFOCUS_UM[0]}-{DEFOCUS_UM[1]} µm, shifts of {SHIFT_A} Å"
    )
    with as_file(package_files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), data, n=PARTICLES, box=BOX, pixel_size=PIXEL_SIZE, snr_db=SNR_DB,
                     defocus_um=DEFOCUS_UM, astigmatism_um=0.05, shift_a=SHIFT_A, seed=0)  # fmt: skip
    note("2/4 converting them to a Zarr store")
    convert.run(urls.join(data, "particles.star"), store, data_dir=None, box=None, dtype="float16", workers=2,
                overwrite=False, invert=False, uninvert=False)  # fmt: skip
    note("3/4 finding map and poses from nothing")
    train.run(None, data=store, out=result, workers="0", device="cpu", resume=False,
              overrides={"guided.shift_radius_a": "6", "monitor.truth": data})  # fmt: skip
    note("4/4 comparing with the truth")
    found = evaluate.run(result, truth=data)
    say(
        f"from random poses to {found['fsc_0.5_angstrom']:.2f} Å (FSC 0.5 against the true map; the data's limit is "
        f"{2 * PIXEL_SIZE:g} Å), median pose error {found['rotation_error_median_deg']:.2f}° and "
        f"{found['shift_error_median_px']:.2f} px, in {(time.monotonic() - start) / 60:.1f} minutes"
    )
    say(f"pictures: {urls.join(result, 'report.html')}, {urls.join(result, 'evaluate_fsc.png')}")
    say(f"TensorBoard: tensorboard --logdir {urls.join(result, 'tb')}")
    say(f"map for ChimeraX: {urls.join(result, 'map.mrc')}")
