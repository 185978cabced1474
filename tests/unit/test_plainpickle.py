"""Pickles: cryoDRGN's own as they are, and nothing executed or allocated for any other."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from scalecryo.data.formats import cryodrgn, plainpickle
from scalecryo.errors import InputError, MissingInputError


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "?"])
def test_arrays_come_back(protocol: int, dtype: str) -> None:
    arrays = (np.arange(24).reshape(2, 3, 4).astype(dtype), np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype)))
    found = plainpickle.load(pickle.dumps(arrays, protocol=protocol), "x")
    for array, back in zip(arrays, found, strict=True):
        assert np.array_equal(array, back)
        assert back.dtype == array.dtype


class _Shell:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for value in (_Shell(mark), [np.zeros(3), _Shell(mark)], np.array([_Shell(mark)], dtype=object)):
        for protocol in range(6):
            with pytest.raises(InputError, match="not a pickle of plain arrays"):
                plainpickle.load(pickle.dumps(value, protocol=protocol), "x.pkl")
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Shell(mark)))
    assert mark.exists()  # the test would have noticed


@pytest.mark.parametrize(
    "data",
    [
        # numpy.ndarray((10**12,)), by REDUCE and by NEWOBJ; _reconstruct of that shape; a bytearray of 2^62 bytes.
        b"cnumpy\nndarray\n((L1000000000000L\nttR.",
        b"\x80\x02cnumpy\nndarray\n((L1000000000000L\ntt\x81.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L1000000000000L\ntS'b'\ntR.",
        b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b"abc.",
        b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"abc.",
        b"\x80\x03K\x01r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x03K\x01p2000000000\n.",
        b"\x80\x03)" + b"0)" * 10_000 + b".",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"",
        b"no pickle",
        pickle.dumps({"a": 1}),
        pickle.dumps(np.array(["a"])),
        pickle.dumps([[[np.zeros(2)]]]),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"x\.pkl: not a pickle of plain arrays") as caught:
        plainpickle.load(data, "x.pkl")
    assert "\n" not in str(caught.value)


def test_cryodrgn_conversions(shared_data: Path) -> None:
    """Reference: what cryoDRGN's own parsers made of a RELION and of a cryoSPARC refinement."""
    from scalecryo.data.formats import cryosparc, relion

    folder = shared_data / "metadata"
    rotation, fraction = cryodrgn.read_poses(str(folder / "star/pfcrt_relion30.pose.pkl"))
    poses = relion.read_poses(str(folder / "star/pfcrt_relion30.star"))
    assert np.abs(rotation - poses.rotation).max() < 1e-6  # single precision
    assert poses.shift is not None
    assert np.abs(fraction * 300 * 1.035 - poses.shift).max() < 1e-4
    rotation, fraction = cryodrgn.read_poses(str(folder / "cs/cryosparc_P12_J24_001.pose.pkl"))
    table = cryosparc.read_particles(str(folder / "cs/cryosparc_P12_J24_001_particles.cs"))
    assert np.abs(rotation - table.columns["rotation"]).max() < 1e-6
    assert np.abs(fraction * 180 * 2.95 - table.columns["shift"]).max() < 1e-4
    ctf = cryodrgn.read_ctf(str(folder / "cs/cryosparc_P12_J24_001.ctf.pkl"))
    assert (ctf.box_size, ctf.pixel_size) == (180, pytest.approx(2.95))
    for name, values in ctf.columns.items():
        assert values == pytest.approx(table.columns[name], rel=1e-6, abs=1e-4), name
    # Rotations alone, without translations.
    rotation, fraction = cryodrgn.read_poses(str(shared_data / "toy/toy_angles.pkl"))
    assert (rotation.shape, fraction.any()) == ((1000, 3, 3), False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "holds 0 arrays"),
        (np.zeros((3, 2, 3)), r"rotations must be N × 3 × 3, found \(3, 2, 3\)"),
        (np.zeros((3, 3, 3)), "the matrix of row 1 is not a rotation"),
        (np.stack([np.eye(3), -np.eye(3)]), "the matrix of row 2 is not a rotation"),
        ((np.stack([np.eye(3)] * 2), np.zeros((3, 2))), "translations must be 2 × 2"),
        ((np.stack([np.eye(3)] * 2), np.full((2, 2), 4.5)), "fractions of the box, not pixels"),
        ((np.stack([np.eye(3)] * 2), np.full((2, 2), np.nan)), "not finite"),
        ((np.zeros(3),) * 3, "holds 3 arrays"),
    ],
)
def test_bad_poses(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "poses.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=message):
        cryodrgn.read_poses(str(path))


def test_bad_ctf(tmp_path: Path) -> None:
    path = tmp_path / "ctf.pkl"
    good = np.tile([128, 1.5, 15000, 14000, 0, 300, 2.7, 0.1, 0], (3, 1))
    for row, column, message in ((1, 0, "one box"), (1, 1, "one box"), (0, 4, "")):
        values = good.copy()
        values[row, column] += 2
        path.write_bytes(pickle.dumps(values))
        if message:
            with pytest.raises(InputError, match=message):
                cryodrgn.read_ctf(str(path))
        else:
            assert cryodrgn.read_ctf(str(path)).columns["astigmatism_angle"].tolist() == [2, 0, 0]
    with pytest.raises(MissingInputError):
        cryodrgn.read_ctf(str(tmp_path / "none.pkl"))
