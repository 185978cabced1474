"""Images into the object of one shard, block by block. Apart from what reads them: this imports torch."""

from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from scalecryo.data.io import urls
from scalecryo.data.storage.shards import CRC_BYTES, encode_index, with_crc


class ShardWriter:
    """One shard of an image array, written block by block.

    Args:
        stream: where the object goes.
        shard_rows, block_rows: rows of a full shard and of a block.
        box_size: side of the images, px.
        dtype: `float16` or `float32`.
    """

    def __init__(self, stream: BinaryIO, shard_rows: int, block_rows: int, box_size: int, dtype: str) -> None:
        self._stream = stream
        self._slots = shard_rows // block_rows
        self._rows = block_rows
        kept = {"float16": torch.float16, "float32": torch.float32}[dtype]
        size = block_rows * box_size * box_size * kept.itemsize
        chunk = torch.zeros(size + CRC_BYTES, dtype=torch.uint8)
        self._chunk: npt.NDArray[np.uint8] = chunk.numpy()
        self._images = chunk[:size].view(kept).view(block_rows, box_size, box_size)
        self._filled = self._blocks = self._bytes = self._crc = 0

    def append(self, images: npt.NDArray) -> None:
        """Add images (n, box, box), float32 or as they are stored."""
        source = torch.from_numpy(images)
        while len(source):
            taken = min(len(source), self._rows - self._filled)
            # Torch's cast to float16 is several times faster than NumPy's.
            self._images[self._filled : self._filled + taken].copy_(source[:taken])
            self._filled += taken
            source = source[taken:]
            if self._filled == self._rows:
                self._flush()

    def _flush(self) -> None:
        with_crc(self._chunk)
        self._put(self._chunk)
        self._blocks, self._filled = self._blocks + 1, 0

    def _put(self, data: npt.NDArray[np.uint8]) -> None:
        self._crc = int(google_crc32c.extend(self._crc, data))
        self._bytes += len(data)
        urls.write_all(self._stream, data.data)

    def finish(self) -> dict[str, int]:
        """Write the last, short block and the index; what a manifest says of the object."""
        if self._filled:
            self._images[self._filled :] = 0  # the array's fill value
            self._flush()
        self._put(encode_index(self._slots, self._blocks, len(self._chunk)))
        return {"bytes": self._bytes, "crc32c": self._crc}
