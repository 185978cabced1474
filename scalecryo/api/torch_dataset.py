"""A store as a PyTorch data set."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from scalecryo.data.particles import CTF_COLUMNS
from scalecryo.data.storage.store import ParticleStore


class ParticleDataset(IterableDataset[dict[str, Tensor]]):
    """Particles of a store, a block at a time, each a dictionary that a DataLoader collates.

    Keys: `image` (y, x), `row`, `half`, `optics_group`; where the store has them, the CTF parameters by name,
    `rotation` (3, 3) and `shift` (2,), Å. Several workers of a DataLoader share the blocks. It opens the store in each
    of them, so it can be pickled.
    """

    def __init__(self, url: str, level: int, *, shuffle: bool, seed: int) -> None:
        """
        Args:
            url: of the store.
            level: box, px.
            shuffle: see `Store.torch_dataset`.
            seed: see there too.

        Raises:
            StoreError: there is no such level.
        """
        store = ParticleStore.open(url)
        self._url, self._level, self._shuffle, self._seed, self._epoch = url, level, shuffle, seed, 0
        self._count, self._block = store.count, store.block_rows(level)
        wanted = ("half", "optics_group", "rotation", "shift", *CTF_COLUMNS)
        self._columns = [name for name in wanted if name in store.columns]

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew: the order is a pure function of seed and epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        store, random = ParticleStore.open(self._url), np.random.default_rng((self._seed, self._epoch))
        blocks = np.arange(-(-self._count // self._block))
        if self._shuffle:
            random.shuffle(blocks)
        worker = get_worker_info()
        for block in blocks if worker is None else blocks[worker.id :: worker.num_workers]:
            start = int(block) * self._block
            stop = min(start + self._block, self._count)
            images = torch.from_numpy(store.read_images(self._level, start, stop).astype(np.float32))
            columns = {
                name: torch.from_numpy(values)
                for name, values in store.read_columns(start, stop, self._columns).items()
            }
            order = np.arange(stop - start)
            if self._shuffle:
                # Of the block, not of how many were drawn before: workers agree.
                np.random.default_rng((self._seed, self._epoch, int(block))).shuffle(order)
            for at in order.tolist():
                one = {name: values[at] for name, values in columns.items()}
                yield {"image": images[at], "row": torch.tensor(start + at), **one}
