"""Hashes of what five small seeded runs leave: a change of the house must not change a bit of them.

    python tools/hash_runs.py OUT [--only guided] [--tree CHECKOUT]

Runs the guided method in one process, in two Ray workers and resumed half way, from imported poses, and the auto-
encoder; prints for each the SHA-256 of map.mrc's voxels, of particles.star and of the values in metrics.jsonl (to nine
digits) that do not tell times, rates or memory (their names aside). Compare two commits on one machine: other
processors round otherwise.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import mrcfile

GUIDED = {"guided.shift_radius_a": "6", "guided.bootstrap_steps": "30", "guided.starts": "1", "train.rows": "900"}
POSES = {"guided.start": "poses", "guided.iterations": "3", "guided.shift_radius_a": "6", "train.rows": "900"}
OLD_NAMES = {
    "guided.iterations": "guided.rungs",
    "guided.starts": "guided.seeds",
}  # before them
ENCODER = {"pose.source": "encoder", "encoder.network": "cnn", "train.steps": "12",
           "train.batch_size": "16", "train.checkpoint_every": "6",
           "encoder.channels": "4,8", "encoder.hidden": "16", "train.box": "32"}  # fmt: skip
UNSTABLE = re.compile(r"second|wait|memory|mib|time|world_size|workers|images/s|per_s|radius|level|modes")


def call(tree: Path, *words: str) -> None:
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "SCALECRYO_THREADS": "1"}
    command = [sys.executable, "-c", "from scalecryo.cli import main; main()", *words]
    done = subprocess.run(command, env=env, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}")


def train(tree: Path, store: Path, run: Path, settings: dict[str, str], *words: str) -> None:
    old = not (tree / "scalecryo" / "runs" / "folder.py").exists()
    named = {(OLD_NAMES.get(key, key) if old else key): value for key, value in settings.items()}
    pairs = [word for key, value in named.items() for word in (f"--{key}", value)]
    call(tree, "train", "--data", str(store), "--out", str(run), *words, *pairs)


def hashes(run: Path) -> dict[str, str]:
    with mrcfile.open(run / "map.mrc", permissive=True) as handle:
        voxels = handle.data.tobytes()
    values = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        values += [f"{row['step']} {value:.9g}" for name, value in row.items() if not UNSTABLE.search(name)]
    kept = json.dumps(sorted(values)).encode()
    table = (run / "particles.star").read_bytes()
    return {name: hashlib.sha256(data).hexdigest()[:16]
            for name, data in (("map", voxels), ("particles", table), ("metrics", kept))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="checkout to run")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    out, tree = args.out.resolve(), args.tree.resolve()
    data, store, posed = out / "data", out / "store.zarr", out / "posed.zarr"
    if not posed.exists():
        with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
            call(tree, "simulate", str(structure), str(data), "--n", "1000", "--box", "64", "--pixel-size", "2.0",
                 "--snr-db", "0", "--defocus-um", "0.8", "1.6", "--shift-a", "2", "--seed", "3")  # fmt: skip
        call(tree, "convert", str(data / "particles.star"), str(store), "--uninvert")
        call(tree, "convert", str(data / "truth.star"), str(posed), "--uninvert")
    runs = {
        "guided": lambda run: train(tree, store, run, GUIDED | {"guided.iterations": "5"}),
        "two workers": lambda run: train(tree, store, run, GUIDED | {"guided.iterations": "5"}, "--workers", "2"),
        "resumed": lambda run: (
            train(tree, store, run, GUIDED | {"guided.iterations": "3"}),
            train(tree, store, run, {"guided.iterations": "5"}, "--resume"),
        ),
        "imported poses": lambda run: train(tree, posed, run, POSES),
        "auto-encoder": lambda run: train(tree, store, run, ENCODER),
    }
    for name, start in runs.items():
        if args.only and name not in args.only:
            continue
        run = out / f"{tree.name}-{name.replace(' ', '-')}"
        subprocess.run(["rm", "-rf", str(run)], check=True)
        start(run)
        print(f"{name:15}", json.dumps(hashes(run)), flush=True)


if __name__ == "__main__":
    main()
