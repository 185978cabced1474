"""Where the stacks are that a table names: beside it, in its project, or in a project that was moved."""

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from scalecryo.data.formats.mrc import Stack
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError, MissingInputError, ScalecryoError

_UNPACKED_LIMIT = 4 << 30


class Place(NamedTuple):
    """Where a stack was found.

    Args:
        url: its address.
        dropped: leading folders of its name that were left out to find it.
    """

    url: str
    dropped: tuple[str, ...] = ()


def _normal(url: str) -> tuple[str, str]:
    """Scheme and path of an address, without turns and doubled slashes."""
    scheme, _, path = url.rpartition("://")
    return scheme, posixpath.normpath(path if scheme else urls.absolute(path))


def _is_below(url: str, folder: str) -> bool:
    """Whether an address lies below a folder by its name; symbolic links may lead anywhere."""
    (scheme, path), (own_scheme, base) = _normal(url), _normal(folder)
    return scheme == own_scheme and path.startswith(base.rstrip("/") + "/")


def _is_there(place: str) -> bool:
    try:
        return urls.exists(place)
    except OSError:  # a name that no file system takes
        return False


def _tails(name: str, folder: str) -> Iterator[Place]:
    """Places below a folder by ever shorter tails of a name, the longest first."""
    path = posixpath.normpath(urls.redacted(name).rpartition("://")[2])
    parts = [part for part in path.split("/") if part]
    for count in range(len(parts)):
        place = urls.join(folder, "/".join(parts[count:]))
        if _is_below(place, folder):
            yield Place(place, tuple(parts[:count]))


def _where_it_ends(places: Sequence[str]) -> str:
    """What is known of links on the way that lead nowhere."""
    links = [link for place in places if (link := urls.dangling(place))]
    return f" ({links[0]})" if links else ""


def find_stack(name: str, table_url: str, data_dir: str | None, allow_outside: bool = False) -> Place:
    """Where a stack that a table names is.

    With `data_dir`: below it by the full name, or by the longest tail of it that leads somewhere, as in a project that
    was moved. Otherwise beside the table, or below any folder above it (RELION names stacks from the project's
    folder), or from the current folder.

    Raises:
        MissingInputError: it is in none of these places.
        InputError: the name leads out of `data_dir`.
    """
    table, shown = urls.redacted(table_url), urls.redacted(name)
    if "::" in name or "\0" in name:
        raise InputError(f"{table}: its stack {shown!r} is no path or plain address; name the file itself")
    if data_dir is None:
        places = [*(urls.join(folder, name) for folder in urls.folders_above(table_url)), name]
        for place in places:
            if _is_there(place):
                return Place(place)
        raise MissingInputError(
            f"{table}: its stack {shown} is not at {urls.redacted(places[0])} nor below any folder above"
            f"{_where_it_ends(places)}; give its folder, or that of the project, by --data-dir"
        )
    full = urls.join(data_dir, name)
    inside = _is_below(full, data_dir)
    if (inside or allow_outside) and _is_there(full):
        return Place(full)
    tails = list(_tails(name, data_dir))
    for tail in tails:
        if _is_there(tail.url):
            return tail
    # Another server is not asked before the user allows it.
    if not inside and not allow_outside and (not urls.is_local(full) or _is_there(full)):
        raise InputError(
            f"{table}: its stack {shown} is outside --data-dir {urls.redacted(data_dir)}; add --allow-outside to "
            "read it"
        )
    raise MissingInputError(
        f"{table}: its stack {shown} is not at {urls.redacted(full)}, and no end of that name is in --data-dir "
        f"{urls.redacted(data_dir)}{_where_it_ends([full, *(tail.url for tail in tails)])}; name the folder that "
        f"holds {urls.name(shown)}, or put a link to it there"
    )


def micrograph_shape(name: str, table_url: str, data_dir: str | None) -> tuple[int, int] | None:
    """Rows and columns of a micrograph that a table names; None where it is not found or cannot be read."""
    try:
        found = Stack.open(find_stack(name, table_url, data_dir).url)
    except ScalecryoError:
        return None
    return found.ny, found.nx


def open_stacks(table: ParticleTable, source: str, data_dir: str | None, allow_outside: bool) -> tuple[Stack, ...]:
    """The stacks of a table, several at a time: from an object store every header takes a few round trips.

    Raises:
        MissingInputError: one is nowhere.
        InputError: one cannot be read, or two names lead to one file though their folders differ.
    """
    for name in table.stacks:
        if "://" in name and urls.redacted(name) != name:
            raise InputError(
                f"{urls.redacted(name)}: the table gives this stack's address with credentials or a query, and stores "
                "keep it; take them out, and give them by the environment or a profile"
            )
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda name: find_stack(name, source, data_dir, allow_outside), table.stacks))
        shortened: dict[str, tuple[str, Place]] = {}
        for name, place in zip(table.stacks, found, strict=True):
            if not place.dropped:
                continue
            other, before = shortened.setdefault(place.url, (name, place))
            if before.dropped != place.dropped:
                raise InputError(
                    f"{urls.redacted(source)}: its stacks {urls.redacted(other)} and {urls.redacted(name)} both lead "
                    f"to {urls.redacted(place.url)}; give a --data-dir that holds their folders"
                )
        stacks = tuple(pool.map(lambda place: Stack.open(place.url), found))
    unpacked = sum(stack.unpacked_bytes for stack in stacks)
    if unpacked > _UNPACKED_LIMIT:
        raise InputError(
            f"{urls.redacted(source)}: its compressed stacks hold {unpacked >> 30} GiB together; unpack them first"
        )
    return stacks
