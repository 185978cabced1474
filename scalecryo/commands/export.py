"""`scalecryo export`: a run's map and poses as another package reads them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scalecryo.commands.console import note, say
from scalecryo.data.formats import cryodrgn, cryosparc, csrows, relion
from scalecryo.data.formats.mrc import read_map, write_map
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.storage.store import ParticleStore, read_attributes
from scalecryo.errors import InputError, MissingInputError, OutputExistsError, ScalecryoError
from scalecryo.runs.folder import RunFolder

_MAPS = ("map.mrc", "half1.mrc", "half2.mrc", "mask.mrc")


@dataclass(frozen=True)
class _Result:
    """A run's particle table.

    Args:
        run: its folder.
        table: the particles.
        poses: their poses in double precision.
        box_size: of the images that the table names, px.
    """

    run: str
    table: ParticleTable
    poses: relion.StarPoses
    box_size: int

    @property
    def shift(self) -> npt.NDArray[np.float64]:
        """(N, 2) Å."""
        return np.zeros((len(self.table), 2)) if self.poses.shift is None else self.poses.shift


def run(run: str, *, format: str, out: str) -> None:
    """Write the tables of one package, and the maps, into the folder `out`.

    relion: particles.star. cryosparc: particles.cs and particles.csg, for the Import Result Group job; where the store
    came from a .cs file, its own rows, uids and fields with new poses. cryodrgn: poses.pkl and, when the particles have
    a CTF, ctf.pkl. Image paths stay as the source table gave them.
    """
    writers: dict[str, Callable[[_Result, str], None]]
    writers = {"relion": _relion, "cryosparc": _cryosparc, "cryodrgn": _cryodrgn}
    if format not in writers:
        raise InputError(f"format {format} is not known: choose relion, cryosparc or cryodrgn")
    if not urls.exists(urls.join(run, "particles.star")):
        raise MissingInputError(
            f"{urls.redacted(run)}: no particles.star, so the run has no poses yet: finish it with scalecryo assign"
        )
    if urls.list_folder(out):
        raise OutputExistsError(f"{urls.redacted(out)} is not empty: remove it, or name another folder with --out")
    result = _read(run)
    for name in _MAPS:
        if urls.exists(urls.join(run, name)):
            density, size, origin = read_map(urls.join(run, name))
            write_map(urls.join(out, name), density, size, origin)
    writers[format](result, out)
    say(f"{urls.redacted(out)}: {len(result.table):,} particles and the maps for {format}")


def _read(run: str) -> _Result:
    """The table and the box of its images, which the store may have cropped: only then the map's is another."""
    path = urls.join(run, "particles.star")
    volume, pixel_size, _ = read_map(urls.join(run, "map.mrc"))
    table = relion.read_particles(path)
    if not table.pixel_size:
        table = replace(table, pixel_size=pixel_size)
    # The map is as wide as the images, in pixels of its own.
    width = volume.shape[-1] * pixel_size
    box_size = 2 * round(width / table.pixel_size / 2) if pixel_size else volume.shape[-1]
    return _Result(run, table, relion.read_poses(path), box_size)


def _relion(result: _Result, out: str) -> None:
    urls.write_bytes_atomic(urls.join(out, "particles.star"), urls.read_bytes(urls.join(result.run, "particles.star")))


def _cryosparc(result: _Result, out: str) -> None:
    path = urls.join(out, "particles.cs")
    table, poses, shift = result.table, result.poses, result.shift
    own = _source_rows(result)
    if own is None:
        sign = _contrast_sign(result.run)
        pose = (poses.rotation, shift)
        cryosparc.write_particles(path, table, _boxes(result), sign, poses.confidence, pose)
    else:
        cryosparc.write_with_poses(path, *own, poses.rotation, shift, poses.confidence, poses.half)
    cryosparc.write_group(urls.join(out, "particles.csg"), "particles.cs", table)


def _boxes(result: _Result) -> npt.NDArray[np.integer] | int:
    """Box of every image; of stacks in several pixel sizes the table must say it."""
    if not result.table.stack_pixel_sizes:
        return result.box_size
    if not result.table.stack_boxes:
        raise InputError(
            f"{urls.redacted(result.run)}: stacks of several pixel sizes but no rlnImageSize in particles.star; add it "
            "to its data_optics"
        )
    return np.array(result.table.stack_boxes)[result.table.columns["stack"]]


def _cryodrgn(result: _Result, out: str) -> None:
    if result.table.stack_pixel_sizes:
        raise InputError("cryoDRGN takes one pixel size; the run's stacks have several: select one optics group")
    cryodrgn.write_poses(urls.join(out, "poses.pkl"), result.table, result.box_size)
    if result.table.has_ctf:
        cryodrgn.write_ctf(urls.join(out, "ctf.pkl"), result.table, result.box_size)


def _source_rows(result: _Result) -> tuple[npt.NDArray[np.void], npt.NDArray[np.integer]] | None:
    """The .cs rows that the run's store came from, and which of them each particle is; None where there are none."""
    try:
        store = ParticleStore.open(RunFolder(result.run).config().run.data)
        data = store.source_cs()
        if data is None:
            return None
        rows, known = csrows.decode(data, urls.redacted(store.url)), store.table()
    except ScalecryoError:
        return None
    place = known.columns["source_row"]
    if known.image_names() != result.table.image_names() or place.max(initial=-1) >= len(rows):
        note("the run's store holds other particles than its .cs table: a new table is written, with new uids")
        return None
    return rows, place


def _contrast_sign(run: str) -> int:
    """−1 where the run's source stacks are protein-dark, as its store recorded; 1 where the store is gone."""
    try:
        return int(read_attributes(RunFolder(run).config().run.data)["sign"])
    except (ScalecryoError, KeyError):
        note("the run's store cannot be read: blob/sign is set to 1, protein-bright; check it in cryoSPARC")
        return 1
