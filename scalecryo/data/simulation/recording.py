"""Simulated images: particles, junk and neighbours under the conditions of each, with noise."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.particles import CTF_COLUMNS, ParticleTable
from scalecryo.data.simulation.imperfections import BLOB, EMPTY, Conditions, stream
from scalecryo.data.simulation.noise import Noise, noise_sigma
from scalecryo.data.simulation.projector import Projector
from scalecryo.data.simulation.settings import Imperfections
from scalecryo.physics.threads import one_torch_thread

_CHUNK = 64
_SAMPLE = 512
# Junk objects: Gaussians in a ball; all in particle diameters.
_BLOBS = 20
_BALL_RADIUS = 0.4
_BLOB_SIGMA = (0.04, 0.10)


class Recording:
    """The images of a table of particles, chunk by chunk.

    With R the recording of a projection (CTF, shift), image i is

        gain_i (scale_i R(particle_i + neighbour_i) + noise_i) + offset_i sigma

    A junk object is a sum of 20 Gaussians at random places within the particle's extent, other ones for every image,
    with the mean variance of the particles' noise-free images. The noise has the variance of the pixels of the first
    512 noise-free images, of particles at scale 1, over 10^(snr_db / 10); sigma is its standard deviation, or that of
    the noise-free images where there is none. A neighbour has its image's CTF.

    Args:
        projectors: of every density, of one box.
        diameter_a: of the particles, Å.
        table: the particles, at their true poses and defoci.
        conditions: under which each is imaged.
        wanted: what is added to an ideal simulation.
        snr_db: signal-to-noise ratio of variances, dB; None for no noise.
        white: stream of the white noise.
        seed: of the other streams.
    """

    def __init__(
        self,
        projectors: Sequence[Projector],
        diameter_a: float,
        table: ParticleTable,
        conditions: Conditions,
        wanted: Imperfections,
        snr_db: float | None,
        white: torch.Generator,
        seed: int,
    ) -> None:
        self._projectors, self._table, self._conditions, self._wanted = projectors, table, conditions, wanted
        first = projectors[0]
        self.box_size, self.pixel_size = first.box_size, first.pixel_size
        self._diameter = diameter_a
        self._blobs = stream(seed, "blobs")
        self._noise: Noise | None = None
        self._signal_sd = self._sigma = 0.0
        self._first: deque[Tensor] = deque()  # noise-free images of the first particles, once they were looked at
        if snr_db is not None or wanted.junk > 0 or wanted.gain_sd > 0:
            self._first.extend(self._made(range(0, min(len(table), _SAMPLE), _CHUNK)))
            sample = torch.cat(list(self._first))
            self._signal_sd = float(sample.double().var(dim=(1, 2), correction=0).mean().sqrt())
            self._sigma = self._signal_sd if snr_db is None else noise_sigma(sample, snr_db)
        if snr_db is not None:
            coloured = stream(seed, "colour")
            self._noise = Noise(self._sigma, wanted.colour, self.box_size, self.pixel_size, white, coloured)

    def __len__(self) -> int:
        return len(self._table)

    def chunks(self) -> Iterator[Float[Tensor, "b n n"]]:
        """All images, in order, some at a time; once, since the noise and what is random are drawn as they come."""
        begun = range(0, _CHUNK * len(self._first), _CHUNK)
        later = range(begun.stop, len(self._table), _CHUNK)
        for first in begun:
            yield self._imaged(self._first.popleft(), self._rows(first))
        for first, images in zip(later, self._made(later), strict=True):
            yield self._imaged(images, self._rows(first))

    def _made(self, starts: Iterable[int]) -> Iterator[Float[Tensor, "b n n"]]:
        """`_particles` of the chunks that begin there, made ahead on as many threads as torch has."""
        threads = torch.get_num_threads()
        with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[Tensor]] = deque()
            for start in starts:
                waiting.append(pool.submit(self._particles, self._rows(start)))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _imaged(self, images: Float[Tensor, "b n n"], rows: Int[NDArray, " b"]) -> Float[Tensor, "b n n"]:
        """The noise-free images of some particles with what else is seen in them."""
        images = self._with_junk(images, rows)
        images = self._with_neighbours(images, rows)
        conditions = self._conditions
        if self._wanted.scale_sd > 0:
            images = images * _column(conditions.scale[rows])
        if self._noise is not None:
            images = images + self._noise.draw(len(rows))
        if self._wanted.gain_sd > 0:
            images = _column(conditions.gain[rows]) * images + self._sigma * _column(conditions.offset[rows])
        return images

    def _rows(self, first: int) -> Int[NDArray, " b"]:
        return np.arange(first, min(first + _CHUNK, len(self._table)))

    def _particles(self, rows: Int[NDArray, " b"]) -> Float[Tensor, "b n n"]:
        """Noise-free images of particles at scale 1, whether or not they are to be junk."""
        table, index = self._table, self._conditions.class_index[rows]
        return self._record(index, table.columns["rotation"][rows], rows, table.columns["shift"][rows])

    def _record(
        self,
        class_index: Int[NDArray, " b"],
        rotation: Float[NDArray, "b 3 3"],
        rows: Int[NDArray, " b"],
        shift: Float[NDArray, "b 2"],
    ) -> Float[Tensor, "b n n"]:
        """Recorded projections of the densities `class_index`, with the CTF of some rows."""
        projections = torch.empty(len(rows), self.box_size, self.box_size)
        for number, projector in enumerate(self._projectors):
            mine = class_index == number
            if mine.any():
                projections[torch.from_numpy(mine)] = projector.project(torch.from_numpy(rotation[mine]))
        return self._projectors[0].record(projections, self._optics(rows), shift)

    def _optics(self, rows: Int[NDArray, " b"]) -> dict[str, NDArray]:
        names = CTF_COLUMNS if self._table.has_ctf else ()
        return {name: self._table.columns[name][rows] for name in names}

    def _with_junk(self, images: Float[Tensor, "b n n"], rows: Int[NDArray, " b"]) -> Float[Tensor, "b n n"]:
        junk = self._conditions.junk[rows]
        images[torch.from_numpy(junk == EMPTY)] = 0.0
        blobs = rows[junk == BLOB]
        if len(blobs):
            projections = torch.stack([self._blob() for _ in blobs])
            seen = self._projectors[0].record(projections, self._optics(blobs), self._table.columns["shift"][blobs])
            seen = seen * (self._signal_sd / seen.std(dim=(1, 2), correction=0, keepdim=True))
            images[torch.from_numpy(junk == BLOB)] = seen
        return images

    def _blob(self) -> Float[Tensor, "n n"]:
        """The projection of a random sum of Gaussians."""
        generator, size = self._blobs, self._diameter / self.pixel_size
        direction = torch.randn(_BLOBS, 3, generator=generator)
        radius = torch.rand(_BLOBS, 1, generator=generator) ** (1 / 3)
        centre = _BALL_RADIUS * size * radius * direction / direction.norm(dim=1, keepdim=True)
        low, high = _BLOB_SIGMA
        sigma = size * (low + (high - low) * torch.rand(_BLOBS, 1, generator=generator))
        axis = torch.arange(self.box_size) - self.box_size // 2
        x, y = (torch.exp(-0.5 * ((axis - centre[:, number, None]) / sigma).square()) / sigma for number in (0, 1))
        return y.mT @ x

    def _with_neighbours(self, images: Float[Tensor, "b n n"], rows: Int[NDArray, " b"]) -> Float[Tensor, "b n n"]:
        neighbours = self._conditions.neighbours
        if neighbours is None or not neighbours.present[rows].any():
            return images
        some = rows[neighbours.present[rows]]
        # Beyond the box there is nothing to see, and the padded image would wrap around.
        distance = np.minimum(self._diameter * neighbours.distance[some], self.box_size * self.pixel_size)
        shift = (distance[:, None] * neighbours.direction[some]).astype(np.float32)
        seen = self._record(neighbours.class_index[some], neighbours.rotation[some], some, shift)
        images[torch.from_numpy(neighbours.present[rows])] += seen
        return images


def _column(values: Float[NDArray, " b"]) -> Float[Tensor, "b 1 1"]:
    return torch.from_numpy(values).float()[:, None, None]
