"""`scalecryo select`: some particles of a table, as a table of either package."""

import numpy as np
import numpy.typing as npt

from scalecryo.commands.console import note, say
from scalecryo.commands.export import point_group
from scalecryo.data.conversion.stacks import find_stack, micrograph_shape
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.cryosparc_axes import turn_of_axes
from scalecryo.data.formats.mrc import Stack
from scalecryo.data.formats.relion.syntax import text_of
from scalecryo.data.formats.translate import cryosparc_extra, left_behind, relion_extra
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.selection.selection import Selection
from scalecryo.errors import InputError, OutputExistsError, ScalecryoError

_Rotations = npt.NDArray[np.float64]
_CLASS_NAMES = {  # in conditions
    "class": relion.CLASS, "class_probability": relion.CLASS_PROBABILITY, "state": relion.STATE,
    "state_probability": relion.STATE_PROBABILITY,
}  # fmt: skip
_Pose = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def run(
    source: str,
    out: str,
    *,
    index: str | None = None,
    query: str | None = None,
    half: int | None = None,
    min_confidence: float | None = None,
    passthrough: tuple[str, ...] = (),
    data_dir: str | None = None,
    expand: bool = False,
) -> None:
    """Write the rows that are asked for; a table of the source's own kind keeps every other byte or field.

    With `expand` every row of a run stands once for each rotation g of its point group, at the pose g R: in a .star
    numbered by rlnParticleId, in a .cs each with a uid of its own.
    """
    if urls.exists(out):
        raise OutputExistsError(f"{urls.redacted(out)}: exists already; name another file")
    name = point_group(source)
    group = _group_of(source, name) if expand else None
    turn = turn_of_axes(name)
    if urls.is_folder(source):
        source = urls.join(source, "particles.star")
    selection = Selection(index, query, half, min_confidence)
    if source.lower().endswith(".star"):
        kept, count = _from_star(source, out, selection, data_dir, group, turn)
    elif source.lower().endswith((".cs", ".csg")):
        kept, count = _from_cs(source, out, selection, passthrough)
    else:
        raise InputError(f"{urls.redacted(source)}: give a .star, .cs or .csg table, or a run's folder")
    copies = "" if group is None else f", each in {len(group)} poses"
    say(f"{urls.redacted(out)}: {kept:,} of {count:,} particles{copies}")


def _group_of(run: str, name: str) -> _Rotations:
    """The rotations of a run's point group.

    Raises:
        InputError: it is no run, or has none.
    """
    # torch takes seconds to import: only when it is needed.
    from scalecryo.physics.symmetry import symmetry_rotations

    group = symmetry_rotations(name).numpy()
    if len(group) == 1:
        raise InputError(f"{urls.redacted(run)}: --expand needs a run that was trained with --symmetry, such as D7")
    return group


def _from_star(
    source: str, out: str, selection: Selection, data_dir: str | None, group: _Rotations | None, turn: _Rotations | None
) -> tuple[int, int]:
    """Rows of a .star: as they are, each in all poses of a group, or for cryoSPARC, turned onto its axes."""
    text = text_of(source)
    table = relion.read_particles(source, text)
    own = relion.OwnColumns(text, urls.redacted(source))
    confidence = own.numbers(relion.MAX_CONFIDENCE) if relion.MAX_CONFIDENCE in own.names else None
    known = {ours: theirs for ours, theirs in _CLASS_NAMES.items() if theirs in own.names}
    keep = selection.mask(table, confidence, [*own.names, *known], lambda name: own.numbers(known.get(name, name)))
    if out.endswith(".star") and group is not None:
        relion.write_expanded(out, text, keep, relion.read_poses(source).rotation, group)
        return int(keep.sum()), len(keep)
    if out.endswith(".star"):
        relion.write_rows(out, text, keep)
        return int(keep.sum()), len(keep)
    rows = np.flatnonzero(keep)
    kept = len(rows)
    rows = rows if group is None else rows.repeat(len(group))
    pose: _Pose | None = None
    if table.has_pose:
        poses = relion.read_poses(source)
        shift = np.zeros((len(table), 2)) if poses.shift is None else poses.shift
        rotation = poses.rotation[rows]
        if group is not None:
            rotation = np.tile(group, (kept, 1, 1)) @ rotation
        if turn is not None:
            note("poses are turned by 90° about z, as cryoSPARC has this group's axes")
            rotation = turn @ rotation
        pose = rotation, shift[rows]
    boxes = (
        np.array(table.stack_boxes)[table.columns["stack"]] if table.stack_boxes else _box_of(table, source, data_dir)
    )
    extra = cryosparc_extra(
        own, lambda name: micrograph_shape(name, source, data_dir), table.pixel_sizes(), table.has_pose
    )
    if said := left_behind(extra, "cryoSPARC"):
        note(said)
    note("blob/sign is set to 1, protein-bright, as RELION extracts particles; check it in cryoSPARC")
    part = table.select(rows)
    picked = None if confidence is None else confidence[rows]
    more = {name: values[rows] for name, values in extra.columns.items()}
    cryosparc.write_particles(out, part, boxes[rows], confidence=picked, pose=pose, more=more)
    return kept, len(keep)


def _box_of(table: ParticleTable, source: str, data_dir: str | None) -> npt.NDArray[np.integer]:
    """Box of every image, from the header of the first stack."""
    try:
        place = find_stack(table.stacks[0], source, data_dir)
        return np.full(len(table), Stack.open(place.url).box_size)
    except ScalecryoError as error:
        raise InputError(f"{error} (asked for the box size, since the table has no rlnImageSize)") from error


def _from_cs(source: str, out: str, selection: Selection, passthrough: tuple[str, ...]) -> tuple[int, int]:
    where = urls.redacted(source)
    rows = csrows.read(source, passthrough)
    table = cryosparc.table_of(rows, where)
    own = cryosparc.classes_of(rows)
    keep = selection.mask(table, cryosparc.confidence_of(rows, where), own.keys(), own.__getitem__)
    chosen = rows[keep]
    if out.endswith(".cs"):
        urls.write_bytes_atomic(out, csrows.encode(chosen))
        return len(chosen), len(keep)
    part = table.select(np.flatnonzero(keep))
    if cryosparc.sign_of(rows, where) == -1:
        note("blob/sign is −1, protein-dark; RELION takes protein-bright images: invert the stacks for it")
    names = part.image_names()
    confidence = cryosparc.confidence_of(chosen, where)
    pose = cryosparc.poses_of(chosen, where)
    extra = relion_extra(chosen)
    if said := left_behind(extra, "RELION"):
        note(said)
    relion.write_particles(out, names, part, pose is not None, confidence=confidence, pose=pose, more=extra.columns,
                           more_optics=extra.optics)  # fmt: skip
    return len(chosen), len(keep)
