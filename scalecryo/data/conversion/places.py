"""What a conversion reads from and writes to, as far as the addresses tell. Imports no torch."""

from typing import Any

from scalecryo.data.io import urls
from scalecryo.data.io.lock import LOCK
from scalecryo.data.storage.store import read_attributes
from scalecryo.errors import InputError, OutputExistsError

TABLE_ENDINGS = (".star", ".cs", ".csg")
STACK_ENDINGS = (".mrcs", ".mrc", ".mrcs.gz", ".mrc.gz", ".mrcs.bz2", ".mrc.bz2")


def check_source(source: str) -> None:
    """Refuse a source that is not there or of no known kind.

    Raises:
        MissingInputError, InputError: as said.
    """
    urls.check_there(source)
    if not source.lower().endswith((*TABLE_ENDINGS, *STACK_ENDINGS)):
        raise unknown_kind(source)


def unknown_kind(source: str) -> InputError:
    """The error that a source is no table and no stack."""
    return InputError(
        f"{urls.redacted(source)}: not a known kind of particle source; give a .star, .cs or .csg table, or an .mrcs "
        "or .mrc stack (cryoDRGN's .pkl files go with it by --poses and --ctf)"
    )


def check_destination(store_url: str, overwrite: bool) -> dict[str, Any]:
    """Attributes of the particle store at a place; empty when the place is free.

    Raises:
        OutputExistsError: something else is there, or a complete store that nobody asked to replace.
    """
    shown = urls.redacted(store_url)
    attrs = read_attributes(store_url)
    if not attrs:
        if urls.exists(store_url) and (not urls.is_folder(store_url) or set(urls.list_folder(store_url)) - {LOCK}):
            raise OutputExistsError(f"{shown}: exists and is not a particle store; choose another place for the store")
    elif attrs.get("complete") is True and not overwrite:
        raise OutputExistsError(
            f"{shown}: a store is there already; add --overwrite to replace it, or --append to add particles to it"
        )
    return attrs
