"""Three examples of every verb, for its help."""

from collections.abc import Mapping
from types import MappingProxyType

EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "simulate": (
            ("ideal particles with a CTF", "simulate 4ake.pdb data --n 5000 --snr-db 0 --defocus-um 0.4 1.2"),
            ("as a microscope makes them",
             "simulate 6vxx.pdb data --pixel-size 2 --snr-db -10 --defocus-um 0.8 2.5 --colour 0.5 --junk 0.1"),
            ("two structures in one set", "simulate open.pdb data --mix closed.pdb --snr-db -5"),
        ),
        "convert": (
            ("RELION's particles", "convert particles.star store.zarr --data-dir /path/to/project"),
            ("a smaller box", "convert particles.star small.zarr --box 128"),
            ("cryoSPARC's, to object storage", "convert particles.cs s3://bucket/store.zarr --passthrough pass.cs"),
        ),
        "info": (
            ("a store, with the memory that a run needs", "info store.zarr"),
            ("a run", "info run"),
            ("what eight GPUs would take", "info store.zarr --plan --gpus 8"),
        ),
        "verify": (
            ("checksums of all objects, and sampled particles", "verify store.zarr"),
            ("every particle", "verify store.zarr --full"),
            ("on object storage", "verify s3://bucket/store.zarr"),
        ),
        "train": (
            ("a map from nothing", "train --data store.zarr --out run"),
            ("four workers, a point group, fewer pixels",
             "train --data store.zarr --out run --workers 4 --symmetry C3 --train.box 128"),
            ("from the poses that came with the particles",
             "train --data store.zarr --out run --guided.start poses"),
        ),
        "assign": (
            ("finish a run that was stopped", "assign run"),
            ("another store, posed by what the run has learnt", "assign run --data more.zarr --out more"),
            ("a run on object storage", "assign s3://bucket/run"),
        ),
        "evaluate": (
            ("a run against its simulation", "evaluate run --truth data"),
            ("poses alone", "evaluate particles.star --truth data"),
            ("a map alone", "evaluate run/map_unsharpened.mrc --truth data"),
        ),
        "export": (
            ("for RELION", "export run --format relion --out for_relion"),
            ("for cryoSPARC's Import Result Group", "export run --format cryosparc --out for_cryosparc"),
            ("for cryoDRGN", "export run --format cryodrgn --out for_cryodrgn"),
        ),
        "select": (
            ("particles that are sure of their pose", "select run good.star --min-confidence 0.5"),
            ("a class", "select run two.star --query 'class == 2'"),
            ("RELION's table for cryoSPARC", "select particles.star particles.cs"),
        ),
        "demo": (
            ("all of it, in minutes", "demo"),
            ("elsewhere", "demo --out /tmp/demo"),
            ("then look at it", "info demo/run"),
        ),
        "help": (
            ("the settings that people set, and examples", "help train"),
            ("a group of settings", "help guided"),
            ("words", "help terms"),
        ),
    }
)  # fmt: skip


def epilogue(verb: str, more: str = "") -> str:
    """What stands under a verb's help: a note, where there is one, and its examples."""
    lines = [line for what, command in EXAMPLES[verb] for line in (f"  # {what}", f"  scalecryo {command}")]
    return "\n\n".join([*filter(None, [more]), "\n".join(["Examples:", *lines])])
