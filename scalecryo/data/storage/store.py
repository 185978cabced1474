"""The particle store: a Zarr v3 group that holds images at several box sizes and one array for each column.

    images/<level>       (N, n, n)   sharded; levels are the full box, then powers of two down to 32
    particles/<column>   (N, …)      one chunk for each image shard
    source/              the table that was converted, verbatim, and the names of its stacks
    source/report.json   what conversion found; excluded.json: images that it left out; copies.npy: rows of one image
    _manifest/           length and CRC32C of every object, one file for each shard
    _append/             only while particles are being added

Images are protein-bright, rows keep the order of the source, and the group attribute `complete` is set last. Any
Zarr v3 reader opens it.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import Text, text_of
from scalecryo.data.io import urls
from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.particles import ABERRATION_COLUMNS, COLUMNS, CTF_COLUMNS, POSE_COLUMNS, Columns, ParticleTable
from scalecryo.data.storage.arrays import ColumnArray, ImageArray, load_chunks
from scalecryo.errors import MissingInputError, StoreError

FORMAT_VERSION = 1
SAME_PIXEL_SIZE = 1e-3  # relative: a fifth of a Fourier pixel 200 of them from the origin
SOURCE_TABLE = "source/particles.star"
SOURCE_CS = "source/particles.cs"
SOURCE_STACKS = "source/stacks.json"
REPORT = "source/report.json"
EXCLUDED = "source/excluded.json"
COPIES = "source/copies.npy"
MANIFESTS = "_manifest"
_MANIFESTS_AT_ONCE = 256

#: Columns that conversion adds: source = sign · (stored · image_scale + image_mean), at the store's full box, and the
#: CRC32C of the source's pixels as float32.
IMAGE_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "image_mean": ("f4", ()),
    "image_scale": ("f4", ()),
    "image_crc32c": ("u4", ()),
}


def read_attributes(url: str) -> dict[str, Any]:
    """Attributes of a store's group; empty when there is no Zarr group or it is not a particle store.

    Raises:
        StoreError: `zarr.json` is damaged.
    """
    try:
        document = urls.read_bytes(urls.join(url, "zarr.json"))
    except MissingInputError:
        return {}
    try:
        attributes: dict[str, Any] = json.loads(document).get("attributes", {})
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{urls.redacted(url)}: its zarr.json is damaged ({error}); convert again") from error
    return attributes if "scalecryo_version" in attributes else {}


class ParticleStore:
    """A store opened for reading; cheap to open, safe to read from several threads."""

    def __init__(self, url: str, attrs: dict[str, Any]) -> None:
        self.url = url
        self.attrs = attrs
        self.count = int(attrs["count"])
        self.box_size = int(attrs["box_size"])
        self.pixel_size = float(attrs["pixel_size"])
        self.dtype = str(attrs["dtype"])
        self.levels: tuple[int, ...] = tuple(attrs["levels"])
        self.shard_rows = int(attrs["shard_rows"])
        self.contrast = str(attrs["contrast"])
        self.columns: tuple[str, ...] = tuple(attrs["columns"])
        self.content_hash = str(attrs.get("content_hash", ""))
        self.grown_from = tuple(str(one["grown_from"]) for one in attrs.get("appended", []) if "grown_from" in one)
        """Content hashes of this store before each time that particles were appended; their rows are as they were."""
        reader = RangeReader()  # one for all arrays: they share its connections
        self._images = {
            level: ImageArray(
                urls.join(url, "images", str(level)),
                f"images/{level}",
                self.count,
                level,
                self.dtype,
                self.block_rows(level),
                self.shard_rows,
                reader,
            )
            for level in self.levels
        }
        known = {**COLUMNS, **IMAGE_COLUMNS}
        self._columns = {
            name: ColumnArray(
                urls.join(url, "particles", name),
                f"particles/{name}",
                self.count,
                *known[name],
                self.shard_rows,
                reader,
            )
            for name in self.columns
        }

    @classmethod
    def open(cls, url: str, require_complete: bool = True) -> "ParticleStore":
        """Open a store.

        Args:
            url: path or URL of the store.
            require_complete: refuse a store whose conversion has not finished.

        Raises:
            MissingInputError: nothing is there.
            StoreError: not a particle store, incomplete, or of another format version.
        """
        url = url.rstrip("/") or url
        attrs = read_attributes(url)
        if not attrs:
            if not urls.exists(url):
                raise MissingInputError(f"{urls.redacted(url)}: no such store; make one with `scalecryo convert`")
            raise StoreError(f"{urls.redacted(url)}: not a particle store; make one with `scalecryo convert`")
        if attrs.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{urls.redacted(url)}: store format {attrs.get('format_version')}, this version of scalecryo reads "
                f"{FORMAT_VERSION}; convert again with --overwrite"
            )
        if require_complete and attrs.get("complete") is not True:
            raise StoreError(
                f"{urls.redacted(url)}: its conversion did not finish; run the same `scalecryo convert` again"
            )
        try:
            return cls(url, attrs)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{urls.redacted(url)}: its attributes are damaged ({error!r}); convert again") from error

    @property
    def has_ctf(self) -> bool:
        """Whether CTF columns are stored."""
        return CTF_COLUMNS[0] in self.columns

    @property
    def has_pose(self) -> bool:
        """Whether the source gave rotations and shifts."""
        return POSE_COLUMNS[0] in self.columns

    @property
    def has_aberrations(self) -> bool:
        """Whether images carry odd or even phases or anisotropic magnification, which are undone when they are read."""
        return ABERRATION_COLUMNS[0] in self.columns

    @property
    def shards(self) -> int:
        """Number of shards of every array."""
        return -(-self.count // self.shard_rows)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the source's image stacks, as its table gives them."""
        return tuple(json.loads(urls.read_bytes(urls.join(self.url, SOURCE_STACKS)))["names"])

    def block_rows(self, level: int) -> int:
        """Rows of one block (inner chunk) of a level.

        Raises:
            StoreError: the store has no such level.
        """
        try:
            return int(self.attrs["block_rows"][str(level)])
        except KeyError as error:
            levels = ", ".join(map(str, self.levels))
            raise StoreError(f"{urls.redacted(self.url)}: no level {level}; it has {levels}") from error

    def level_pixel_size(self, level: int) -> float:
        """Pixel size of a level in Å."""
        return self.pixel_size * self.box_size / level

    def check_images(self, level: int, pixel_size: float) -> None:
        """Refuse images that cannot be compared with a run's maps of `level` pixels of `pixel_size` Å.

        Raises:
            StoreError: the store has no such level, or one of another pixel size.
        """
        sizes = {one: self.level_pixel_size(one) for one in self.levels}
        if not math.isclose(sizes.get(level, 0.0), pixel_size, rel_tol=SAME_PIXEL_SIZE):
            found = ", ".join(f"{one} px of {size:.4g} Å" for one, size in sizes.items())
            raise StoreError(
                f"{urls.redacted(self.url)}: its images are {found}, the run's maps {level} px of {pixel_size:.4g} Å: "
                "bring them to the run's box and pixel size with scalecryo convert --box, or resample the particles"
            )

    def image_array(self, level: int) -> ImageArray:
        """The reader of one level.

        Raises:
            StoreError: the store has no such level.
        """
        self.block_rows(level)
        return self._images[level]

    def column_array(self, name: str) -> ColumnArray:
        """The reader of one column.

        Raises:
            StoreError: the store has no such column.
        """
        if name not in self._columns:
            raise StoreError(
                f"{urls.redacted(self.url)}: the source had no {name}; there are {', '.join(self.columns)}"
            )
        return self._columns[name]

    def read_images(self, level: int, start: int, stop: int, out: npt.NDArray | None = None) -> npt.NDArray:
        """Rows start…stop−1 of a level, (n, box, box), protein-bright, in the stored dtype.

        Raises:
            StoreError: no such level, or a shard is missing or damaged.
        """
        return self.image_array(level).read(start, stop, out)

    def read_columns(self, start: int, stop: int, names: tuple[str, ...] | list[str] | None = None) -> Columns:
        """Rows start…stop−1 of columns by name; all columns by default.

        Raises:
            StoreError: no such column, or an object is missing or damaged.
        """
        arrays = {name: self.column_array(name) for name in names or self.columns}
        if stop - start <= self.shard_rows:
            load_chunks(arrays.values(), {row // self.shard_rows for row in (start, max(start, stop - 1))})
        return {name: array.read(start, stop) for name, array in arrays.items()}

    @property
    def source_pixel_size(self) -> float:
        """Pixel size of the source in Å, before any cropping."""
        return self.pixel_size * self.box_size / int(self.attrs["source_box_size"])

    def table(self) -> ParticleTable:
        """The particle table that was converted, in memory: its pixel size is the source's, before any cropping."""
        names = [name for name in self.columns if name in COLUMNS]
        document = json.loads(urls.read_bytes(urls.join(self.url, SOURCE_STACKS)))
        # Where stacks differ; those that were added since are as the store is.
        added = len(document["names"]) - len(document.get("boxes", []))
        sizes = tuple(document["pixel_sizes"]) + (self.source_pixel_size,) * added if "boxes" in document else ()
        boxes = tuple(document["boxes"]) + (int(self.attrs["source_box_size"]),) * added if sizes else ()
        columns = self.read_columns(0, self.count, names)
        return ParticleTable(self.source_pixel_size, tuple(document["names"]), columns, sizes, boxes)

    def source_star(self) -> Text | None:
        """The source table as it was, when it was a .star file."""
        return self._document(SOURCE_TABLE)

    def source_cs(self) -> bytes | None:
        """The source table as a .cs file, when it came from cryoSPARC."""
        found = self._document(SOURCE_CS)
        return None if found is None else bytes(found)

    def copies(self) -> npt.NDArray[np.int64]:
        """Rows that share an image with others, (c, 3): the row, the first row of that image, and the half that the
        table puts them all in (0: it does not say, or says both); ascending. Empty in a store of an older version.

        Raises:
            StoreError: the list is damaged.
        """
        try:
            data = urls.read_bytes(urls.join(self.url, COPIES))
            found = np.load(io.BytesIO(data), allow_pickle=False)
            if found.ndim != 2 or found.shape[1] != 3 or found.dtype != np.int64:
                raise ValueError(f"{found.dtype} {found.shape}")
        except MissingInputError:
            found = np.zeros((0, 3), np.int64)
        except (ValueError, EOFError) as error:
            raise StoreError(f"{urls.redacted(self.url)}: its {COPIES} is damaged ({error}); convert again") from error
        return found

    def _document(self, name: str) -> Text | None:
        try:
            return text_of(urls.join(self.url, name))
        except MissingInputError:
            return None

    def manifest(self, shard: int) -> dict[str, dict[str, int]]:
        """Length and CRC32C of every object of one shard, by key.

        Raises:
            StoreError: the manifest is missing or damaged.
        """
        return read_manifest(self.url, f"{shard:08d}")

    def undo_normalisation(self, images: npt.NDArray, columns: Columns) -> npt.NDArray[np.float32]:
        """Source pixels behind stored full-box images, given their `image_mean` and `image_scale`."""
        scale, mean = (columns[name][:, None, None] for name in ("image_scale", "image_mean"))
        source: npt.NDArray[np.float32] = images.astype(np.float32) * scale + mean
        return source * np.float32(self.attrs["sign"])


def read_manifest(url: str, name: str, folder: str = MANIFESTS) -> dict[str, dict[str, int]]:
    """One manifest of a store: length and CRC32C by object key.

    Raises:
        StoreError: it is missing or damaged.
    """
    return read_manifests(url, [name], folder)[0]


def read_manifests(url: str, names: Sequence[str], folder: str = MANIFESTS) -> list[dict[str, dict[str, int]]]:
    """Several manifests of a store, from an object store many at a time.

    Raises:
        StoreError: one is missing or damaged.
    """
    found: list[dict[str, dict[str, int]]] = []
    for start in range(0, len(names), _MANIFESTS_AT_ONCE):
        addresses = [urls.join(url, folder, f"{name}.json") for name in names[start : start + _MANIFESTS_AT_ONCE]]
        try:
            documents = urls.read_many(addresses)
        except MissingInputError as error:
            gone = next((url for url in addresses if not urls.exists(url)), addresses[0])
            raise StoreError(
                f"{urls.redacted(gone)}: the manifest is missing; convert again with --overwrite"
            ) from error
        for address, document in zip(addresses, documents, strict=True):
            try:
                found.append(json.loads(document))
            except ValueError as error:
                raise StoreError(
                    f"{urls.redacted(address)}: the manifest is damaged; convert again with --overwrite"
                ) from error
    return found
