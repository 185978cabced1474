"""`scalecryo export`: a run's map and poses as another package reads them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from scalecryo.commands.console import note, say
from scalecryo.commands.export_folder import Advice, link_stacks
from scalecryo.data.conversion.stacks import micrograph_shape
from scalecryo.data.formats import cryodrgn, cryosparc, csrows, relion
from scalecryo.data.formats.cryosparc_axes import turn_of_axes, turned_map
from scalecryo.data.formats.mrc import read_map, write_map
from scalecryo.data.formats.relion.syntax import text_of
from scalecryo.data.formats.translate import cryosparc_extra, left_behind
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.storage.store import SOURCE_STACKS, ParticleStore, read_attributes
from scalecryo.errors import InputError, MissingInputError, OutputExistsError
from scalecryo.runs.folder import RunFolder

_MAPS = ("map.mrc", "map_unsharpened.mrc", "half1.mrc", "half2.mrc", "mask.mrc")


@dataclass(frozen=True)
class _Result:
    """A run's particle table.

    Args:
        run: its folder.
        table: the particles.
        poses: their poses in double precision.
        box_size: of the images that the table names, px.
        z: coordinates in the components' latent space, (N, q); None: none were learnt.
    """

    run: str
    table: ParticleTable
    poses: relion.StarPoses
    box_size: int
    z: npt.NDArray[np.float64] | None = None

    @property
    def shift(self) -> npt.NDArray[np.float64]:
        """(N, 2) Å."""
        return np.zeros((len(self.table), 2)) if self.poses.shift is None else self.poses.shift


@dataclass(frozen=True)
class _Origin:
    """What only the run's store knows of its source.

    Args:
        url: address of the source's table.
        sign: −1 where its stacks are protein-dark.
        rows: those of its .cs table, and which of them each particle is; None where it had none.
    """

    url: str
    sign: int
    rows: tuple[npt.NDArray[np.void], npt.NDArray[np.integer]] | None = None


def run(run: str, *, format: str, out: str, data: str | None = None, data_dir: str | None = None) -> None:
    """Write the tables of one package, the maps and links to the stacks into the folder `out`; print what to do there.

    `data` is the run's store, if it was moved; `data_dir` the folder that the stacks' names are relative to.

    relion: particles.star. cryosparc: particles.cs and particles.csg, for the Import Result Group job; where the store
    came from a .cs file, its own rows, uids and fields with new poses. cryodrgn: poses.pkl and, when the particles have
    a CTF, ctf.pkl, and particles.star for its loader. Coordinates of components go along, as components_mode_0/value …
    and as z.pkl. Image paths stay as the source table gave them, and lead to the stacks from `out` by links there.
    """
    if format not in ("relion", "cryosparc", "cryodrgn"):
        raise InputError(f"format {format} is not known: choose relion, cryosparc or cryodrgn")
    urls.check_there(run)
    if not urls.exists(urls.join(run, "particles.star")):
        raise MissingInputError(
            f"{urls.redacted(run)}: no particles.star, so the run has no poses yet: finish it with scalecryo assign"
        )
    if urls.list_folder(out):
        raise OutputExistsError(f"{urls.redacted(out)} is not empty: remove it, or name another folder with --out")
    result = _read(run)
    group = point_group(run)
    axes = group if format == "cryosparc" else "C1"
    turn = turn_of_axes(axes)
    if turn is not None:
        note(f"{group}: a two-fold lies on y in cryoSPARC, on x in RELION: poses and maps are turned by 90° about z")
        result = replace(result, poses=result.poses._replace(rotation=turn @ result.poses.rotation))
    # Refused before anything is written.
    origin = _origin(result, data) if format == "cryosparc" else None
    for folder in ("", *RunFolder(run).class_folders()):
        for name in _MAPS:
            if urls.exists(urls.join(run, folder, name) if folder else urls.join(run, name)):
                _copy_map(run, out, axes, *filter(None, (folder, name)))
    if origin is not None:
        _cryosparc(result, out, origin)
    elif format == "cryodrgn":
        _cryodrgn(result, out)
    else:
        _relion(result, out)
    known = _known_store(run, data)
    if known:
        for told in link_stacks(out, result.table.stacks, known["source"], data_dir or known.get("data_dir") or None):
            note(f"not linked: {told}")
    else:
        note("nothing is known of the run's store: put links to the stacks, named as in the table, into the folder")
    say(f"{urls.redacted(out)}: {len(result.table):,} particles and the maps for {format}")
    advice = Advice.of(run, out, group, int(known["sign"]) < 0 if known else None)
    for line in (f"# {advice.contrast}", *advice.commands(format)):
        say(line)


def _known_store(run: str, data: str | None) -> dict[str, Any]:
    """Attributes of the run's store, with where its source was; empty where it is gone."""
    if data is None and not urls.exists(urls.join(run, "config.toml")):
        return {}
    attrs = read_attributes(data or RunFolder(run).config().run.data)
    return attrs if "source" in attrs and "sign" in attrs else {}


def _copy_map(run: str, out: str, group: str, *names: str) -> None:
    density, size, origin_a = read_map(urls.join(run, *names))
    urls.make_folder(urls.parent(urls.join(out, *names)))
    write_map(urls.join(out, *names), turned_map(density, group), size, origin_a)


def point_group(run: str) -> str:
    """What a run was trained with, about RELION's axes; C1 where nothing is known."""
    known = urls.exists(urls.join(run, "config.toml"))
    return RunFolder(run).config().train.symmetry.strip().upper() if known else "C1"


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
    return _Result(run, table, relion.read_poses(path), box_size, _coordinates(path))


def _coordinates(path: str) -> npt.NDArray[np.float64] | None:
    """Columns scalecryoComponent1 … of a table; None where it has none."""
    own = relion.OwnColumns(text_of(path), path)
    names = [name for name in own.names if name.removeprefix(relion.COMPONENT).isdecimal()]
    return np.stack([own.numbers(name) for name in names], 1) if names else None


def _relion(result: _Result, out: str) -> None:
    urls.write_bytes_atomic(urls.join(out, "particles.star"), urls.read_bytes(urls.join(result.run, "particles.star")))


def _cryosparc(result: _Result, out: str, origin: _Origin) -> None:
    path = urls.join(out, "particles.cs")
    table, poses, shift = result.table, result.poses, result.shift
    components = {} if result.z is None else cryosparc.component_fields(result.z)
    if origin.rows is None:
        own = relion.OwnColumns(text_of(urls.join(result.run, "particles.star")), result.run)
        extra = cryosparc_extra(
            own, lambda name: micrograph_shape(name, origin.url, None), table.pixel_sizes(), posed=True
        )
        if said := left_behind(extra, "cryoSPARC"):
            note(said)
        pose = poses.rotation, shift
        more = {**extra.columns, **components}
        cryosparc.write_particles(path, table, _boxes(result), origin.sign, poses.confidence, pose, more)
    else:
        own = relion.OwnColumns(text_of(urls.join(result.run, "particles.star")), result.run)
        # The source's own class comes back as it was; those of a run stand beside their probability, as states do.
        ours = relion.CLASS_PROBABILITY in own.names or relion.STATE in own.names
        classes = own.numbers(relion.CLASS).astype(np.int64) if ours else None
        cryosparc.write_with_poses(
            path, *origin.rows, poses.rotation, shift, poses.confidence, poses.half, classes, components
        )
    cryosparc.write_group(urls.join(out, "particles.csg"), "particles.cs")


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
    _relion(result, out)
    cryodrgn.write_poses(urls.join(out, "poses.pkl"), result.table, result.box_size)
    if result.table.has_ctf:
        cryodrgn.write_ctf(urls.join(out, "ctf.pkl"), result.table, result.box_size)
    if result.z is not None:
        cryodrgn.write_latents(urls.join(out, "z.pkl"), result.z)


def _origin(result: _Result, data: str | None) -> _Origin:
    """What the store of a run, or the one in its new place, knows of the source.

    Raises:
        MissingInputError: the store is not there any more.
        InputError: it holds other particles than the run.
    """
    star = urls.join(result.run, "particles.star")
    if data is None and not urls.exists(urls.join(result.run, "config.toml")):
        note("nothing is known of the run's store: blob/sign is set to 1, protein-bright; check it in cryoSPARC")
        return _Origin(star, 1)
    where = data or RunFolder(result.run).config().run.data
    attrs = read_attributes(where)
    if not attrs:
        raise MissingInputError(
            f"{urls.redacted(where)}: the run's store is not there, and only it knows uids, fields and contrast of the "
            "source; give its new place by --data"
        )
    origin = _Origin(str(attrs.get("source", star)), int(attrs["sign"]))
    if not urls.exists(urls.join(where, SOURCE_STACKS)):
        return origin
    store = ParticleStore.open(where)
    known, count = store.table(), len(result.table)
    # Particles may have been added since: those of the run come first.
    if known.image_names()[:count] != result.table.image_names():
        raise InputError(
            f"{urls.redacted(where)}: holds other particles than the run {urls.redacted(result.run)}; give the run's "
            "own store by --data"
        )
    cs = store.source_cs()
    if cs is None:
        return origin
    return replace(origin, rows=(csrows.decode(cs, urls.redacted(where)), known.columns["source_row"][:count]))
