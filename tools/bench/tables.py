"""How fast, and in how much memory, a large RELION table is read and written back with new poses.

    python -m tools.bench tables [ROWS] [--folder DIR]

Makes a 3.1 table of ROWS rows (10^6 by default, about 300 MB) with 28 columns as a refinement has them, and prints, for
each step in a process of its own: seconds on the clock and of the processor (on a busy machine only these mean much),
the process's largest resident memory, and processor time relative to starfile's (pandas) reading of the same file.
`base` is what importing the package costs.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS = """CoordinateX CoordinateY ClassNumber AnglePsi AutopickFigureOfMerit MicrographName OpticsGroup
CtfMaxResolution CtfFigureOfMerit DefocusU DefocusV DefocusAngle CtfBfactor CtfScalefactor PhaseShift GroupNumber
AngleRot AngleTilt OriginXAngst OriginYAngst NormCorrection LogLikeliContribution MaxValueProbDistribution
NrOfSignificantSamples RandomSubset BeamTiltX BeamTiltY ImageName""".split()  # noqa: SIM905


def make(path: Path, rows: int) -> None:
    """A refinement's table: two optics groups, 500 particles a micrograph."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        stream.write("\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n")
        stream.write("_rlnVoltage #3\n_rlnSphericalAberration #4\n_rlnAmplitudeContrast #5\n_rlnImagePixelSize #6\n")
        stream.write("_rlnImageSize #7\n1 a 300.0 2.7 0.1 1.06 256\n2 b 300.0 2.7 0.1 1.06 256\n\n")
        stream.write("# version 30001\n\ndata_particles\n\nloop_\n")
        stream.writelines(f"_rln{name} #{number + 1}\n" for number, name in enumerate(COLUMNS))
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            values = rng.uniform(0, 180, (count, 12))
            for row, v in enumerate(values.tolist()):
                micrograph, image = divmod(start + row, 500)
                name = f"{micrograph:06d}_FoilHole_2231_Data_2235_20_20201012"
                stream.write(
                    f"{v[0] * 20:12.6f} {v[1] * 20:12.6f} {1:12d} {v[2]:12.6f} {v[3] / 9:12.6f} "
                    f"MotionCorr/job002/{name}.mrc {1 + micrograph % 2:12d} {3.5:12.6f} {0.1:12.6f} "
                    f"{10000 + v[4] * 90:12.6f} {9900 + v[4] * 90:12.6f} {v[5]:12.6f} {0:12.6f} {1:12.6f} {0:12.6f} "
                    f"{1:12d} {v[6] - 90:12.6f} {v[7]:12.6f} {v[8] / 30 - 3:12.6f} {v[9] / 30 - 3:12.6f} {0.8:12.6f} "
                    f"{v[10] * 1e3:12.6e} {v[11] / 180:12.6f} {3:12d} {1 + row % 2:12d} {0:12.6f} {0:12.6f} "
                    f"{image + 1:06d}@Extract/job010/{name}.mrcs\n"
                )


def step(name: str, path: str) -> None:
    """One measurement, in this process; prints seconds and KiB."""
    import torch

    from scalecryo.data.formats import relion
    from scalecryo.data.formats.relion.syntax import text_of

    torch.set_num_threads(1)
    start, processor = time.perf_counter(), time.process_time()
    if name == "starfile":
        import starfile

        starfile.read(path)
    elif name != "base":
        table = relion.read_particles(path)
        if name == "write":
            start, processor = time.perf_counter(), time.process_time()
            columns = table.columns
            relion.write_with_poses(
                path + ".out", text_of(path), table, columns["rotation"], columns["shift"],
                np.ones(len(table)), columns["half"],
            )  # fmt: skip
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    sys.stdout.write(f"{seconds} {processor} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--folder", help="where to put the table; a temporary folder when absent")
    parser.add_argument("--without-starfile", action="store_true", help="it needs many times the table's memory")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        step(*asked.step)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "particles.star"
        make(path, asked.rows)
        found = {}
        for name in ("base", "read", "write", *(() if asked.without_starfile else ("starfile",))):
            command = [sys.executable, "-m", "tools.bench", "tables", "--step", name, str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            found[name] = float(output[0]), float(output[1]), int(output[2]) / 1e6
        print(f"{asked.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB, {len(COLUMNS)} columns\n")
        print("| step | s | s of processor | largest RSS, GB | processor / starfile's |")
        print("| --- | --- | --- | --- | --- |")
        for name, (seconds, processor, memory) in found.items():
            ratio = f"{processor / found['starfile'][1]:.2f}" if "starfile" in found and name != "base" else "–"
            print(f"| {name} | {seconds:.1f} | {processor:.1f} | {memory:.2f} | {ratio} |")
