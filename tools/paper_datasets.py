"""The simulated datasets A to G of Nashed et al. 2021, Table 1, exactly: 9,000 training and 1,000 test images.

    python tools/paper_datasets.py OUT_DIR [--only A D G]

writes OUT_DIR/A … OUT_DIR/G, each as `scalecryo simulate` does. Train with `--train.rows 9000`: the last 1,000 rows
are the test images. Structure: PDB entry 4AKE, both chains, 128 px of 0.8 Å.
"""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from scalecryo.commands import simulate

TRAIN, TEST, BOX, PIXEL_SIZE = 9_000, 1_000, 128, 0.8
#: name: (SNR in dB or None, defocus range in µm or None)
DATASETS: dict[str, tuple[float | None, tuple[float, float] | None]] = {
    "A": (None, None),
    "B": (10.0, None),
    "C": (5.0, None),
    "D": (0.0, None),
    "E": (-5.0, None),
    "F": (-10.0, None),
    "G": (0.0, (0.4, 1.2)),
}


def write_dataset(name: str, folder: Path, *, shift_a: float = 0.0, seed: int = 0) -> None:
    """Simulate one dataset into a folder."""
    snr_db, defocus_um = DATASETS[name]
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(folder), n=TRAIN + TEST, box=BOX, pixel_size=PIXEL_SIZE, snr_db=snr_db,
                     defocus_um=defocus_um, astigmatism_um=0.0, shift_a=shift_a, seed=seed)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS))
    arguments = parser.parse_args()
    for name in arguments.only:
        write_dataset(name, arguments.out_dir / name)


if __name__ == "__main__":
    main()
