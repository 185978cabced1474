"""The verbs: their arguments, what their help says, and examples. Imports no torch.

A verb's module is imported only when it runs, after `arguments` looked at what it was given.
"""

import math
from importlib import import_module
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from scalecryo import __version__
from scalecryo.commands.console import check_conversion, check_group
from scalecryo.commands.examples import epilogue
from scalecryo.commands.recipe_files import recipe_file
from scalecryo.commands.setting_options import FIRST, settings_options
from scalecryo.errors import UsageError
from scalecryo.settings import RECIPES

app = App(
    name="scalecryo",
    version=__version__,
    help="Cryo-EM ab initio reconstruction, streamed and distributed: particle stacks to map and poses.",
    help_epilogue="scalecryo VERB --help: all options and three examples. scalecryo help terms: what the words mean. "
    "Every verb takes --debug to show the full traceback of an error.",
    help_format="plaintext",
    default_parameter=Parameter(negative=""),
    suppress_keyboard_interrupt=False,
)

_CHECKED = ("simulate", "convert", "verify", "assign", "evaluate", "demo")  # the other verbs import little themselves


def _run(verb: str, *args: Any, **kwargs: Any) -> None:
    """Refuse wrong arguments, then import the verb, which may take seconds, and run it."""
    if verb in _CHECKED:
        getattr(import_module("scalecryo.commands.arguments"), f"check_{verb}")(*args, **kwargs)
    import_module(f"scalecryo.commands.{verb}").run(*args, **kwargs)


@app.command(
    help_epilogue=epilogue(
        "simulate",
        "Without the options from --colour on, the set is ideal. Each of them has its own random numbers: "
        "switching one on changes no other draw. particles.star says what a user would be told, micrographs "
        "of 100 images each included; truth.star holds poses, true defocus and labels: rlnClassNumber (0: "
        "junk), scalecryoJunk (1: empty, 2: another object), scalecryoNeighbour (1: has one), "
        "rlnGroupScaleCorrection (scale), rlnNormCorrection (gain), scalecryoOffset (grey level, in standard "
        "deviations of the noise).",
    )
)
def simulate(
    structure: str,
    out_dir: str,
    /,
    *,
    n: int = 10_000,
    box: int = 128,
    pixel_size: float = 0.8,
    snr_db: float | None = None,
    defocus_um: tuple[float, float] | None = None,
    astigmatism_um: float = 0.0,
    shift_a: float = 0.0,
    seed: int = 0,
    colour: float = 0.0,
    scale_sd: float = 0.0,
    gain_sd: float = 0.0,
    junk: float = 0.0,
    neighbours: float = 0.0,
    prefer: tuple[float, float] | None = None,
    defocus_error_a: float = 0.0,
    mix: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    micelle: float = 0.0,
    symmetry: str = "C1",
    hinge: str | None = None,
    shares: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (),
) -> None:
    """Simulate particles of a structure (PDB, mmCIF) or map (MRC), with known truth.

    Args:
        structure: .pdb, .cif (also .gz), or a map .mrc
        out_dir: folder for particles.mrcs, particles.star (no poses), truth.star, truth.mrc
        n: number of particles
        box: box size, px, even
        pixel_size: Angstrom per pixel
        snr_db: signal-to-noise ratio of variances, dB; noise-free when absent
        defocus_um: smallest and largest defocus, micrometres; no CTF when absent
        astigmatism_um: largest difference between defocus U and V, micrometres
        shift_a: standard deviation of the shift along x and along y, Angstrom
        seed: of all that is drawn
        colour: share of the noise's power that is low-pass, falling as 1/(1 + (30 A x frequency)^2); the rest is white
        scale_sd: spread of the signal's scale of each micrograph: standard deviation of its logarithm
        gain_sd: spread of each image's gain of signal and noise: standard deviation of its logarithm; grey levels then
            scatter by 3 x this x the noise's standard deviation
        junk: share of the images without a particle: half of them empty, half of random Gaussian blobs of the
            particle's extent and power
        neighbours: share of the images that also show another particle, 0.9 to 1.3 particle diameters away; none in
            empty ones
        prefer: share of the views within so many degrees of the volume's +z axis; the rest is uniform over all views
        defocus_error_a: standard deviation of the error of the defocus in particles.star, Angstrom
        mix: more structures or maps: each particle is one of all with equal probability; structures keep the
            coordinates of their files, and the first one's centre of mass is the centre of all
        micelle: mean density of a belt of detergent around the structure, relative to the protein's: an ellipsoid about
            the z axis, 40 Angstrom thick, 25 Angstrom wider than the protein
        symmetry: point group (C7, D2, T, O, I, I1 to I4): the map is the sum of the structure's copies about RELION's
            axes; a structure is first moved off the axes until the copies touch, or as far as the box allows; a map is
            not moved
        hinge: CHAINS:AXIS:DEGREES:STEPS, as A,B:z:60:20, H:0,1,1:360:100 or A:random:40:50: as many conformers of the
            first structure, some chains turned in steps or at random about the middle of their contact with the others
        shares: of each conformer and structure among the particles; equal when absent
    """
    check_group(symmetry)
    _run("simulate", structure, out_dir, n=n, box=box, pixel_size=pixel_size, snr_db=snr_db,
         defocus_um=defocus_um, astigmatism_um=astigmatism_um, shift_a=shift_a, seed=seed, colour=colour,
         scale_sd=scale_sd, gain_sd=gain_sd, junk=junk, neighbours=neighbours, prefer=prefer,
         defocus_error_a=defocus_error_a, mix=mix, micelle=micelle, symmetry=symmetry, hinge=hinge,
         shares=shares)  # fmt: skip


@app.command(help_epilogue=epilogue("convert"))
def convert(
    source: str,
    store: str,
    /,
    *,
    data_dir: str | None = None,
    box: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    workers: int = 2,
    overwrite: bool = False,
    uninvert: bool = False,
    invert: bool = False,
    bad_images: Literal["refuse", "exclude"] = "refuse",
    append: bool = False,
    scheduler: str | None = None,
    ctf: str | None = None,
    poses: str | None = None,
    pixel_size: float | None = None,
    passthrough: tuple[str, ...] = (),
    mixed_optics: Literal["refuse", "resample"] = "refuse",
    allow_outside: bool = False,
) -> None:
    """Convert a particle stack into a chunked Zarr store that training streams from.

    A conversion that was interrupted goes on when it is run again.

    Args:
        source: RELION .star, cryoSPARC .cs or .csg, or a stack .mrcs/.mrc
        store: where to write, any fsspec URL
        data_dir: folder that the stacks' paths are relative to
        box: Fourier-crop the particles to this box, px
        dtype: of the stored images
        workers: threads that write shards side by side
        overwrite: replace an existing store
        uninvert: the images are protein-bright: keep their sign
        invert: the images are protein-dark: turn their sign
        bad_images: that cannot be stored (not finite, constant, too large): stop, or leave them out
        append: add the particles to the complete store that is there
        scheduler: address of a dask scheduler, tcp://host:port, whose workers do the work
        ctf: cryoDRGN's ctf.pkl, or values for all images: voltage=300,spherical_aberration=2.7,amplitude_contrast=0.1,
            defocus_u=15000 (kV, mm, Angstrom, degrees; also defocus_v, astigmatism_angle, phase_shift)
        poses: cryoDRGN's poses.pkl
        pixel_size: Angstrom, where the table and its stacks do not say
        passthrough: a cryoSPARC file of the same particles with more fields, joined by uid
        mixed_optics: stacks of several pixel sizes: stop, or resample them to the coarsest
        allow_outside: read stacks that the table names outside --data-dir
    """
    check_conversion(invert=invert, uninvert=uninvert, append=append, overwrite=overwrite, box=box)
    reading = {"ctf": ctf, "poses": poses, "pixel_size": pixel_size, "passthrough": passthrough,
               "mixed_optics": mixed_optics, "allow_outside": allow_outside}  # fmt: skip
    _run("convert", source, store, data_dir=data_dir, box=box, dtype=dtype, workers=workers, overwrite=overwrite,
         invert=invert, uninvert=uninvert, bad_images=bad_images, add=append, scheduler=scheduler,
         reading=reading)  # fmt: skip


@app.command(help_epilogue=epilogue("info"))
def info(path: str, /, *, plan: bool = False, gpus: int = 8, gpu: Literal["H100", "A100"] = "H100") -> None:
    """Describe a store, a run, a table (.star) or a stack or map (.mrc, .mrcs).

    Args:
        path: what to describe
        plan: of a store, also predict memory, time and cost of a run on GPUs
        gpus: how many of them
        gpu: their kind
    """
    _run("info", path, plan=plan, gpus=gpus, gpu=gpu)


@app.command(help_epilogue=epilogue("verify"))
def verify(store: str, /, *, full: bool = False) -> None:
    """Check a store against its manifest, and sampled rows against the source.

    Args:
        store: the store to check
        full: also decode every chunk and compare every row
    """
    _run("verify", store, full=full)


@app.command(
    help_epilogue=epilogue("train", "Recipes: " + "; ".join(f"{name}: {how}" for name, how in RECIPES.items()) + ".")
)
def train(
    config: str | None = None,
    /,
    *,
    settings: settings_options() = None,  # type: ignore[valid-type]
    resume: Annotated[bool, Parameter(group=FIRST)] = False,
    recipe: Annotated[str | None, Parameter(group=FIRST)] = None,
    follow: Annotated[bool, Parameter(group=FIRST)] = False,
    follow_hours: Annotated[float | None, Parameter(group=FIRST)] = None,
) -> None:
    """Train on a store, from nothing to a map and a pose for every particle.

    The command line goes over the TOML file. A setting that the recipe does not read is refused.

    Args:
        config: TOML file of settings
        resume: go on from the newest checkpoint in the run's folder
        recipe: name of a TOML file that comes with the package, such as paper-known
        follow: go on each time that `convert --append` has added particles, until a file named stop lies in the run
        follow_hours: the same for so many hours
    """
    config = recipe_file(recipe, config)
    tables: dict[str, dict[str, Any]] = settings or {}
    overrides = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    if follow_hours is not None and not follow_hours > 0:
        raise UsageError(f"--follow-hours {follow_hours:g}: hours above 0 are needed")
    hours = math.inf if follow and follow_hours is None else follow_hours
    _run("train", config, resume=resume, overrides=overrides, follow_hours=hours)


@app.command(help_epilogue=epilogue("assign"))
def assign(run: str, /, *, data: str | None = None, out: str | None = None) -> None:
    """Give every particle a pose, and write half-maps, FSC and the final map.

    Args:
        run: folder of a trained run
        data: another store than the one it was trained on
        out: where to write; the run's folder when absent
    """
    _run("assign", run, data=data, out=out)


@app.command(help_epilogue=epilogue("evaluate"))
def evaluate(
    path: str, /, *, truth: Annotated[str, Parameter(name=("--truth", "--reference"))], symmetry: str | None = None
) -> None:
    """Compare a run, a table or a map with a known truth: one JSON line, pictures, and a sentence.

    Args:
        path: a run's folder, a .star with poses, or a map .mrc
        truth: folder with truth.star and truth.mrc, as simulate writes them; or one map (.mrc, .map) or structure
            (.pdb, .cif, also .gz) of any box, pixel size and orientation, with which the map is compared
        symmetry: point group (C7, D2, T, O, I, I1 to I4) about axes of any direction in the true map, modulo which
            poses are compared; a run's own when absent
    """
    if symmetry is not None:
        check_group(symmetry)
    _run("evaluate", path, truth=truth, symmetry=symmetry)


@app.command(help_epilogue=epilogue("export"))
def export(
    run: str, /, *, format: Literal["relion", "cryosparc", "cryodrgn"], out: str, data: str | None = None,
    data_dir: str | None = None,
) -> None:  # fmt: skip
    """Write a run's map, poses and links to its stacks as a folder that another package starts from.

    Args:
        run: folder of a finished run
        format: the package to write for
        out: folder to write into
        data: the run's store, where it was moved since: cryoSPARC's uids, fields and contrast are kept there
        data_dir: folder that the stacks' paths are relative to, where it is not convert's any more
    """
    _run("export", run, format=format, out=out, data=data, data_dir=data_dir)


@app.command(help_epilogue=epilogue("select"))
def select(
    source: str,
    out: str,
    /,
    *,
    index: str | None = None,
    query: str | None = None,
    half: Literal[1, 2] | None = None,
    min_confidence: float | None = None,
    passthrough: tuple[str, ...] = (),
    data_dir: str | None = None,
    expand: bool = False,
) -> None:
    """Write some particles of a table as a table: all its columns, in its own order; or turn .star into .cs and back.

    Args:
        source: .star, .cs or .csg, or a run's folder
        out: where to write, .star or .cs
        index: rows to keep, from 0: a text file with one on each line, or a .npy
        query: a condition on columns, such as "defocus_u < 20000 and confidence > 0.5" or "class == 2" (from 1); in a
            .star also its own columns, such as rlnGroupNumber
        half: keep the particles of this half
        min_confidence: keep the particles at least this sure of their pose, 0 to 1
        passthrough: a cryoSPARC file of the same particles with more fields, joined by uid
        data_dir: folder of the stacks, asked for the box size where a .star does not say
        expand: of a run with --symmetry: each particle in all of its symmetry-related poses, copies in one half
    """
    if not out.endswith((".star", ".cs")):
        raise UsageError(f"{out}: name a .star or .cs file to write")
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UsageError(f"--min-confidence {min_confidence:g}: confidence lies between 0 and 1")
    _run("select", source, out, index=index, query=query, half=half, min_confidence=min_confidence,
         passthrough=passthrough, data_dir=data_dir, expand=expand)  # fmt: skip


@app.command(help_epilogue=epilogue("demo"))
def demo(*, out: str = "demo") -> None:
    """Simulate adenylate kinase, convert, train, evaluate: a few minutes on two cores.

    Args:
        out: folder to write into
    """
    _run("demo", out=out)


@app.command(name="help", help_epilogue=epilogue("help"))
def explain(topic: str = "", /) -> None:
    """Explain a verb in short, a group of settings, or the words that are used.

    Args:
        topic: a verb, a group of settings such as guided, or terms; all verbs when absent
    """
    if topic:
        _run("help", topic)
    else:
        app.help_print([])
