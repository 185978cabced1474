"""cryoDRGN's pickles against the ones that cryoDRGN itself made from the same RELION table."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalecryo.data.formats import cryodrgn
from scalecryo.data.formats.relion import read_particles
from scalecryo.data.particles import ParticleTable


class PlainNumpy(pickle.Unpickler):
    """Refuses whatever is not part of NumPy's array pickling by its NumPy 1 names."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        return super().find_class(module, name)


@pytest.fixture
def pfcrt(shared_data: Path, tmp_path: Path) -> ParticleTable:
    """RELION 3.0 refinement; cryoDRGN was given the amplitude contrast that the file lacks by hand (0.1)."""
    lines = (shared_data / "metadata/star/pfcrt_relion30.star").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("_rln"))
    number = int(lines[last].split("#")[1]) + 1
    rows = [f"{line} 0.1" if line.split() else line for line in lines[last + 1 :]]
    path = tmp_path / "pfcrt.star"
    path.write_text("\n".join([*lines[: last + 1], f"_rlnAmplitudeContrast #{number}", *rows, ""]))
    return read_particles(str(path))


def load(path: Path) -> Any:
    return PlainNumpy(io.BytesIO(path.read_bytes())).load()


def test_poses(shared_data: Path, tmp_path: Path, pfcrt: ParticleTable) -> None:
    cryodrgn.write_poses(str(tmp_path / "poses.pkl"), pfcrt, 300)
    rotation, translation = load(tmp_path / "poses.pkl")
    with open(shared_data / "metadata/star/pfcrt_relion30.pose.pkl", "rb") as file:
        expected_rotation, expected_translation = pickle.load(file)
    # Ours are single precision.
    np.testing.assert_allclose(rotation, expected_rotation, atol=1e-6)
    np.testing.assert_allclose(translation, expected_translation, atol=1e-7)
    assert rotation.dtype == translation.dtype == np.float32


def test_ctf(shared_data: Path, tmp_path: Path, pfcrt: ParticleTable) -> None:
    cryodrgn.write_ctf(str(tmp_path / "ctf.pkl"), pfcrt, 300)
    found = load(tmp_path / "ctf.pkl")
    with open(shared_data / "metadata/star/pfcrt_relion30.ctf.pkl", "rb") as file:
        expected = pickle.load(file)
    assert found.dtype == expected.dtype
    # RELION's U < V; ours is the same ellipse with U ≥ V and its axis turned by 90°.
    turned = found.copy()
    swap = expected[:, 2] < expected[:, 3]
    assert swap.any()
    turned[swap] = turned[swap][:, [0, 1, 3, 2, 4, 5, 6, 7, 8]]
    turned[swap, 4] -= 90
    np.testing.assert_allclose(turned, expected, rtol=1e-6, atol=1e-4)


def test_large_arrays_keep_their_bytes(tmp_path: Path, pfcrt: ParticleTable) -> None:
    many = pfcrt.select(np.arange(20_000) % len(pfcrt))
    cryodrgn.write_poses(str(tmp_path / "poses.pkl"), many, 300)
    rotation, _ = load(tmp_path / "poses.pkl")
    np.testing.assert_array_equal(rotation, many.columns["rotation"].transpose(0, 2, 1))
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops((tmp_path / "poses.pkl").read_bytes())}
    # Nothing newer than Python 3.0 reads.
    assert not opcodes & {"FRAME", "STACK_GLOBAL", "BYTEARRAY8"}
