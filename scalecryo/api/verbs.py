"""The verbs of the command line as functions. They say on standard output and error what the commands say."""

from collections.abc import Mapping
from importlib.resources import as_file
from importlib.resources import files as package_files
from typing import Any, Literal

from scalecryo.api.run import Run, open_run
from scalecryo.api.store import Store, open_store

POSES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "refine": {"guided.start": "poses"},
    "known": {"pose.source": "known", "train.steps": 1},
}


def reconstruct(
    store: str | Store,
    out: str,
    *,
    poses: Literal["none", "refine", "known"] = "none",
    symmetry: str = "C1",
    workers: int | str = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """A map from particles, and a pose for every one of them: what `scalecryo train` does.

    Args:
        store: a particle store, or its address.
        out: folder of the run; made here.
        poses: none: found from nothing; refine: those that came with the particles, refined; known: taken as they are.
        symmetry: point group.
        workers: 0: this process alone; N or "MIN:MAX": Ray Train.
        device: of each worker.
        resume: go on with the run in `out`.
        settings: any other setting by `section.key`, as in `scalecryo train --help`.

    Raises:
        ConfigError: a setting is unknown, or not read by the recipe.
        TrainingError, StoreError, InputError: it cannot be done; one line says why.
    """
    from scalecryo.commands import train

    given = dict(POSES[poses])
    if symmetry.strip().upper() != "C1":
        given["train.symmetry"] = symmetry
    address = store if isinstance(store, str) else store.url
    train.run(
        None, resume=resume, overrides={**given, **(settings or {})}, data=address, out=out, workers=str(workers),
        device=device,
    )  # fmt: skip
    return open_run(out)


def simulate(
    out: str,
    structure: str | None = None,
    *,
    n: int = 1000,
    box: int = 64,
    pixel_size: float = 1.6,
    snr_db: float | None = 0.0,
    defocus_um: tuple[float, float] | None = (0.4, 1.2),
    shift_a: float = 0.0,
    seed: int = 0,
    **more: Any,
) -> str:
    """Particles of a structure with known truth, written as `scalecryo simulate` writes them.

    Args:
        out: folder for particles.mrcs, particles.star, truth.star and truth.mrc.
        structure: PDB, mmCIF or map; None: adenylate kinase (4AKE), which comes with the package.
        n: particles.
        box: px, even.
        pixel_size: Å.
        snr_db: ratio of variances, dB; None: no noise.
        defocus_um: smallest and largest, µm; None: no CTF.
        shift_a: standard deviation along x and y, Å.
        seed: of all that is drawn.
        more: `colour`, `junk`, `prefer` and the other options of `scalecryo simulate --help`.

    Returns:
        The address of particles.star, for `convert`.

    Raises:
        OutputExistsError, InputError: it cannot be written, or the settings contradict each other.
    """
    from scalecryo.commands import simulate as command
    from scalecryo.data.io import urls

    given: dict[str, Any] = {
        "n": n, "box": box, "pixel_size": pixel_size, "snr_db": snr_db, "defocus_um": defocus_um,
        "astigmatism_um": 0.0, "shift_a": shift_a, "seed": seed, **more,
    }  # fmt: skip
    if structure is None:
        with as_file(package_files("scalecryo.data") / "4ake.pdb.gz") as packed:
            command.run(str(packed), out, **given)
    else:
        command.run(structure, out, **given)
    return urls.join(out, "particles.star")


def convert(
    source: str,
    store: str,
    *,
    data_dir: str | None = None,
    box: int | None = None,
    contrast: Literal["judge", "keep", "invert"] = "judge",
    overwrite: bool = False,
    workers: int = 2,
) -> Store:
    """A particle table and its stacks as a store: what `scalecryo convert` does.

    Args:
        source: RELION .star, cryoSPARC .cs or .csg, or a stack.
        store: where to.
        data_dir: folder that the stacks' paths are relative to.
        box: Fourier-crop to it, px.
        contrast: judge: look at the images; keep: they are protein-bright; invert: protein-dark.
        overwrite: replace a store that is there.
        workers: threads.

    Raises:
        InputError, MissingInputError, OutputExistsError: one line says what is wrong.
    """
    from scalecryo.commands import convert as command

    command.run(
        source, store, data_dir=data_dir, box=box, dtype="float16", workers=workers, overwrite=overwrite,
        invert=contrast == "invert", uninvert=contrast == "keep",
    )  # fmt: skip
    return open_store(store)
