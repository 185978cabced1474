"""`scalecryo export`: a run's map and poses as another package reads them."""

from scalecryo.commands.console import note, say
from scalecryo.data import cryodrgn, cryosparc, files, star
from scalecryo.data.mrc import read_map, write_map
from scalecryo.data.particles import ParticleTable
from scalecryo.data.store import read_attributes
from scalecryo.errors import InputError, MissingInputError, OutputExistsError, ScalecryoError
from scalecryo.train.run_folder import RunFolder

_MAPS = ("map.mrc", "half1.mrc", "half2.mrc", "mask.mrc")


def run(run: str, *, format: str, out: str) -> None:
    """Write the tables of one package, and the maps, into the folder `out`.

    relion: particles.star. cryosparc: particles.cs and particles.csg, for the Import Result Group job. cryodrgn:
    poses.pkl and, when the particles have a CTF, ctf.pkl. Image paths stay as the source table gave them.
    """
    writers = {"relion": _relion, "cryosparc": _cryosparc, "cryodrgn": _cryodrgn}
    if format not in writers:
        raise InputError(f"format {format} is not known: choose relion, cryosparc or cryodrgn")
    if not files.exists(files.join(run, "particles.star")):
        raise MissingInputError(
            f"{files.shown(run)}: no particles.star, so the run has no poses yet: finish it with scalecryo assign"
        )
    if files.list_folder(out):
        raise OutputExistsError(f"{files.shown(out)} is not empty: remove it, or name another folder with --out")
    volume, pixel_size, _ = read_map(files.join(run, "map.mrc"))
    table = star.read_particles(files.join(run, "particles.star"))
    if not table.pixel_size:
        table = ParticleTable(pixel_size, table.stacks, table.columns)
    for name in _MAPS:
        if files.exists(files.join(run, name)):
            density, size, origin = read_map(files.join(run, name))
            write_map(files.join(out, name), density, size, origin)
    writers[format](run, out, table, volume.shape[-1])
    say(f"{files.shown(out)}: {len(table):,} particles and the maps for {format}")


def _relion(run: str, out: str, table: ParticleTable, box_size: int) -> None:
    files.write_bytes_atomic(files.join(out, "particles.star"), files.read_bytes(files.join(run, "particles.star")))


def _cryosparc(run: str, out: str, table: ParticleTable, box_size: int) -> None:
    confidence = star.read_poses(files.join(run, "particles.star")).confidence
    cryosparc.write_particles(files.join(out, "particles.cs"), table, box_size, _contrast_sign(run), confidence)
    cryosparc.write_group(files.join(out, "particles.csg"), "particles.cs", table)


def _cryodrgn(run: str, out: str, table: ParticleTable, box_size: int) -> None:
    cryodrgn.write_poses(files.join(out, "poses.pkl"), table, box_size)
    if table.has_ctf:
        cryodrgn.write_ctf(files.join(out, "ctf.pkl"), table, box_size)


def _contrast_sign(run: str) -> int:
    """−1 where the run's source stacks are protein-dark, as its store recorded; 1 where the store is gone."""
    try:
        return int(read_attributes(RunFolder(run).config().run.data)["sign"])
    except (ScalecryoError, KeyError):
        note("the run's store cannot be read: blob/sign is set to 1, protein-bright; check it in cryoSPARC")
        return 1
