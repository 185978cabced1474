"""cryoDRGN's input files: pickled arrays of poses and of CTF parameters.

Poses are `(rotations (N, 3, 3), translations (N, 2))`: rotations are RELION's Euler matrices A = Rᵀ, translations are
rlnOrigin in fractions of the box, minus our shift. CTF rows are box (px), pixel size (Å), defocus U and V (Å),
astigmatism angle (°), voltage (kV), spherical aberration (mm), amplitude contrast, phase shift (°).
"""

import pickle

import numpy as np
from numpy.typing import NDArray

from scalecryo.data import files
from scalecryo.data.particles import CTF_COLUMNS, ParticleTable


def write_poses(url: str, table: ParticleTable, box_size: int) -> None:
    """Write poses.pkl for particles with poses, whose images are `box_size` px wide."""
    rotation = np.ascontiguousarray(table.columns["rotation"].transpose(0, 2, 1), dtype=np.float32)
    translation = (-table.columns["shift"] / (table.pixel_size * box_size)).astype(np.float32)
    _write(url, (rotation, translation))


def write_ctf(url: str, table: ParticleTable, box_size: int) -> None:
    """Write ctf.pkl for particles with CTF parameters, whose images are `box_size` px wide."""
    size = np.full(len(table), box_size, np.float32)
    pixel_size = np.full(len(table), table.pixel_size, np.float32)
    _write(url, np.stack([size, pixel_size, *(table.columns[name] for name in CTF_COLUMNS)], axis=1))


def _write(url: str, data: NDArray | tuple[NDArray, ...]) -> None:
    # Protocol 3 writes names as lines of text. NumPy 1 knows its arrays by the older of the two names of one module;
    # NumPy 2 knows both. The name stands once, at the start.
    text = pickle.dumps(data, protocol=3)
    files.write_bytes_atomic(url, text.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))
