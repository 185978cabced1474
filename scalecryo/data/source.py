"""What a conversion reads: a particle table, and the stacks it names, found and checked by their headers."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from scalecryo.data import files
from scalecryo.data.cryosparc import read_particles as read_cryosparc
from scalecryo.data.mrc import Stack
from scalecryo.data.particles import ParticleTable
from scalecryo.data.star import read_particles as read_star
from scalecryo.errors import InputError, MissingInputError

_STACK_ENDINGS = (".mrcs", ".mrc", ".mrcs.gz", ".mrc.gz", ".mrcs.bz2", ".mrc.bz2")


@dataclass(frozen=True)
class Source:
    """A table and its stacks, one for one with `table.stacks`.

    Args:
        table: the particles.
        stacks: opened stacks; all square, even, and of one box size.
        box_size: that box, px.
        pixel_size: Å, of the table or else of the stacks' headers.
        star: the table's file verbatim, when it is a .star file.
    """

    table: ParticleTable
    stacks: tuple[Stack, ...] = field(repr=False)
    box_size: int
    pixel_size: float
    star: bytes | None = field(repr=False, default=None)

    def fingerprint(self) -> str:
        """Hash of the table and of every stack's length and time of change."""
        digest = hashlib.sha256()
        for name, values in sorted(self.table.columns.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        for name, stack in zip(self.table.stacks, self.stacks, strict=True):
            digest.update(repr((name, stack.fingerprint)).encode())
        return digest.hexdigest()


def find_stack(name: str, table_url: str, data_dir: str | None) -> str:
    """Where a stack that a table names is.

    With `data_dir`: below it by the full name, or by the file's name alone. Otherwise beside the table, or below any
    folder above it (RELION names stacks from the project's folder), or from the current folder.

    Raises:
        MissingInputError: it is in none of these places.
    """
    if data_dir is not None:
        places = [files.join(data_dir, name), files.join(data_dir, files.name(name))]
    else:
        places = [*(files.join(folder, name) for folder in files.folders_above(table_url)), name]
    for place in places:
        if files.exists(place):
            return place
    elsewhere = "there by its name alone" if data_dir else "below any folder above"
    raise MissingInputError(
        f"{files.shown(table_url)}: its stack {name} is not at {files.shown(places[0])} nor {elsewhere}; "
        "give its folder by --data-dir"
    )


def _check(table: ParticleTable, stacks: tuple[Stack, ...], where: str) -> int:
    """The common box size of the stacks."""
    box_size = stacks[0].box_size
    for number, stack in enumerate(stacks):
        shown = files.shown(stack.url)
        if stack.box_size != box_size:
            raise InputError(
                f"{shown}: box {stack.box_size} px, but {files.shown(stacks[0].url)} has {box_size} px; "
                "rescale or pad them to one box"
            )
        index = table.columns["stack_index"][table.columns["stack"] == number]
        if len(index) and index.max() >= stack.count:
            raise InputError(
                f"{shown}: {where} asks for image {index.max() + 1} but the stack holds {stack.count}; "
                "they do not belong together"
            )
    if box_size % 2:
        raise InputError(
            f"{files.shown(stacks[0].url)}: box {box_size} px is odd; crop or pad the particles to an even box"
        )
    return box_size


def _stack_table(url: str) -> tuple[ParticleTable, Stack]:
    """The table of a bare stack: every image, nothing known about it."""
    stack = Stack.open(url)
    rows = np.arange(stack.count)
    zero = np.zeros(stack.count)
    columns = {"stack": zero, "stack_index": rows, "source_row": rows, "optics_group": zero + 1, "half": zero}
    return ParticleTable(stack.pixel_size, (files.name(url),), columns), stack


def read_source(source: str, data_dir: str | None = None) -> Source:
    """Read a table or a bare stack, open every stack's header, and check that all fits together.

    Args:
        source: `.star`, cryoSPARC's `.cs`, or `.mrcs`/`.mrc`; path or URL.
        data_dir: folder against which the table names its stacks.

    Raises:
        MissingInputError: the source or a stack does not exist.
        InputError: an unknown kind of file, an odd or non-square box, stacks of unlike boxes, an image number past the
            end of a stack, no particles, or no pixel size anywhere.
    """
    star = None
    if source.endswith((".star", ".cs")):
        if source.endswith(".star"):
            star = files.read_bytes(source)
            table = read_star(source)
        else:
            table = read_cryosparc(source)
        if not len(table):
            raise InputError(f"{files.shown(source)}: holds no particles")
        # Several at a time: from an object store every header takes a few round trips.
        with ThreadPoolExecutor(max_workers=16) as pool:
            stacks = tuple(pool.map(lambda name: Stack.open(find_stack(name, source, data_dir)), table.stacks))
    elif source.lower().endswith(_STACK_ENDINGS):
        table, stack = _stack_table(source)
        stacks = (stack,)
    else:
        raise InputError(
            f"{files.shown(source)}: not a known kind of particle source; give a .star or .cs table, "
            "or an .mrcs or .mrc stack"
        )
    box_size = _check(table, stacks, files.shown(source))
    pixel_size = table.pixel_size or stacks[0].pixel_size
    if not pixel_size:
        raise InputError(
            f"{files.shown(source)}: no pixel size, neither in the table (rlnImagePixelSize) nor in the header of "
            f"{files.shown(stacks[0].url)}; add one of them"
        )
    return Source(table, stacks, box_size, pixel_size, star)
