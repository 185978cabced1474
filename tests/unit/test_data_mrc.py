"""MRC reading against real files in every encoding, and writing against mrcfile."""

from pathlib import Path

import mrcfile
import numpy as np
import pytest

from scalecryo.data.formats.mrc import Stack, StackWriter, read_map, write_map
from scalecryo.errors import InputError, MissingInputError

# How `tricky/` encodes ref_f32.mrcs (its README): stored = value · scale + offset, and how far rounding may go.
ENCODINGS = {
    "ref_f32.mrcs": (1, 0, 0),
    "ref_f32.mrcs.gz": (1, 0, 0),
    "ref_f32.mrcs.bz2": (1, 0, 0),
    "mode2_bigendian.mrcs": (1, 0, 0),
    "zero_pixel_size.mrcs": (1, 0, 0),
    "stack_saved_as_volume_ispg1.mrc": (1, 0, 0),
    # float16 keeps 11 bits: values up to 4.4 are rounded by at most 2^-9.
    "mode12_float16.mrcs": (1, 0, 2**-9),
    # 0.5 is half a step; float32 holds the stored integers and the products to 1e-3.
    "mode1_int16_x1000.mrcs": (1000, 0, 0.501),
    "mode1_int16_x1000_bigendian.mrcs": (1000, 0, 0.501),
    "mode6_uint16_x1000_plus32768.mrcs": (1000, 32768, 0.501),
    "mode0_int8_x20.mrcs": (20, 0, 0.501),
}


@pytest.fixture(scope="session")
def reference(shared_data: Path) -> np.ndarray:
    with mrcfile.open(shared_data / "tricky" / "ref_f32.mrcs") as file:
        return np.array(file.data)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_reference(name: str, shared_data: Path, reference: np.ndarray) -> None:
    scale, offset, tolerance = ENCODINGS[name]
    stack = Stack.open(str(shared_data / "tricky" / name))
    assert (stack.count, stack.ny, stack.nx, stack.box_size) == (4, 128, 128, 128)
    assert stack.pixel_size == (0 if name == "zero_pixel_size.mrcs" else 1.31)
    images = stack.read(slice(None))
    assert images.dtype == np.float32
    assert np.abs(images - (reference * scale + offset)).max() <= tolerance
    assert np.array_equal(stack.read([3, 0, 1, 1]), images[[3, 0, 1, 1]])


def test_single_image_and_extended_header(shared_data: Path, reference: np.ndarray) -> None:
    single = Stack.open(str(shared_data / "tricky" / "single_image_2d.mrc"))
    assert np.array_equal(single.read([0]), reference[:1])
    path = shared_data / "tricky" / "fei1_extended_header_crop256.mrc"
    with mrcfile.open(path) as file:
        assert np.array_equal(Stack.open(str(path)).read([0])[0], file.data.astype(np.float32))


def test_header_without_map_identifier(shared_data: Path) -> None:
    stack = Stack.open(str(shared_data / "toy" / "toy_projections.mrcs"))
    with mrcfile.open(shared_data / "toy" / "toymodel_small_nocenter.mrc") as file:
        mass = float(file.data.sum())
    assert (stack.count, stack.box_size, stack.pixel_size) == (1000, 30, 1.0)
    # Projections along any direction keep the mass, but for what the interpolation of 1 px blobs loses (about 1 %).
    assert stack.read(slice(0, 20)).sum(axis=(1, 2)) == pytest.approx(mass, rel=0.05)


def test_truncated_stack_is_refused_before_reading(shared_data: Path) -> None:
    with pytest.raises(InputError, match=r"says 11029 images of 128 × 128 pixels but the file ends after 1"):
        Stack.open(str(shared_data / "tricky" / "header_nz_11029_but_1_image.mrcs"))


@pytest.mark.parametrize(
    ("name", "shape", "pixel_size", "origin"),
    [
        ("maps/1ake_chainA_64.mrc", (64,) * 3, 2.0, (-64.0, -64.0, -64.0)),
        ("maps/emd_1832.map", (64,) * 3, 5.7, (-182.4, -182.4, -182.4)),
        ("maps/emd_5625.map", (56,) * 3, 4.23, (-118.44, -118.44, -118.44)),
        ("maps/EMD-3197.map", (20,) * 3, 11.4, (-22.8, 0.0, 0.0)),
        ("maps/EMD-3197.map.bz2", (20,) * 3, 11.4, (-22.8, 0.0, 0.0)),
        ("maps/emd_3197.map.gz", (20,) * 3, 11.4, (-22.8, 0.0, 0.0)),
    ],
)
def test_real_maps(shared_data: Path, name: str, shape: tuple, pixel_size: float, origin: tuple) -> None:
    volume, size, where = read_map(str(shared_data / name))
    with mrcfile.open(shared_data / name) as file:
        assert np.array_equal(volume, file.data)
    assert volume.shape == shape
    assert size == pytest.approx(pixel_size, abs=1e-5)
    assert where == pytest.approx(origin, abs=1e-3)


def test_axis_order_of_the_file_is_undone(tmp_path: Path) -> None:
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with mrcfile.new(tmp_path / "turned.mrc") as file:
        file.set_data(volume.transpose(2, 0, 1).copy())  # sections along x, rows along z, columns along y
        file.header.mapc, file.header.mapr, file.header.maps = 2, 3, 1
        file.header.nxstart, file.header.nystart, file.header.nzstart = 20, 30, 10  # of y, z, x
        file.voxel_size = 2.0
    found, _, origin = read_map(str(tmp_path / "turned.mrc"))
    assert np.array_equal(found, volume)
    assert origin == (20.0, 40.0, 60.0)


def test_written_map_is_valid_and_comes_back(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(3, 2, (6, 8, 10)).astype(np.float32)
    path = tmp_path / "new" / "map.mrc"
    write_map(str(path), volume, 1.25, (1.0, -2.0, 3.0))
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        assert np.array_equal(file.data, volume)
        assert file.is_volume()
        assert file.header.rms == pytest.approx(volume.std(), rel=1e-5)
    found, pixel_size, origin = read_map(str(path))
    assert np.array_equal(found, volume)
    assert (pixel_size, origin) == (1.25, (1.0, -2.0, 3.0))
    with pytest.raises(InputError, match="three axes"):
        write_map(str(path), volume[0], 1.0)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_stack_writer(tmp_path: Path, scheme: str) -> None:
    images = np.random.default_rng(1).normal(size=(5, 6, 6)).astype(np.float32)
    url = str(tmp_path / "s.mrcs") if scheme == "local" else "memory://stack-writer/s.mrcs"
    with StackWriter(url, 5, 6, 1.5) as writer:
        writer.append(images[:2])
        writer.append(images[2:])
    stack = Stack.open(url)
    assert np.array_equal(stack.read(slice(None)), images)
    assert stack.pixel_size == 1.5
    if scheme == "local":
        assert mrcfile.validate(url)
        with mrcfile.open(url) as file:
            assert file.is_image_stack()


def test_unfinished_stack_leaves_nothing(tmp_path: Path) -> None:
    def stop_early() -> None:
        with StackWriter(str(tmp_path / "s.mrcs"), 5, 6, 1.5) as writer:
            writer.append(np.zeros((2, 6, 6)))

    with pytest.raises(InputError, match="2 of 5 images"):
        stop_early()
    with StackWriter(str(tmp_path / "t.mrcs"), 1, 6, 1.5) as writer:
        with pytest.raises(InputError, match="does not fit"):
            writer.append(np.zeros((2, 6, 6)))
        writer.append(np.zeros((1, 6, 6)))
    assert [path.name for path in tmp_path.iterdir()] == ["t.mrcs"]


def test_bad_files_are_named(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.mrcs: no such file"):
        Stack.open(str(tmp_path / "nowhere.mrcs"))
    (tmp_path / "short.mrcs").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"short\.mrcs: not an MRC file"):
        Stack.open(str(tmp_path / "short.mrcs"))
    (tmp_path / "text.mrcs").write_bytes(b"data_ loop_ text " * 100)
    with pytest.raises(InputError, match="no byte order"):
        Stack.open(str(tmp_path / "text.mrcs"))
    header = bytearray((shared_data / "tricky" / "ref_f32.mrcs").read_bytes())
    header[12:16] = (4).to_bytes(4, "little")
    (tmp_path / "complex.mrcs").write_bytes(header)
    with pytest.raises(InputError, match="MRC mode 4 is not supported"):
        Stack.open(str(tmp_path / "complex.mrcs"))
    packed = (shared_data / "tricky" / "ref_f32.mrcs.gz").read_bytes()
    (tmp_path / "cut.mrcs.gz").write_bytes(packed[:5000])
    with pytest.raises(InputError, match="damaged compressed file"):
        Stack.open(str(tmp_path / "cut.mrcs.gz"))


def test_index_and_shape_errors(tmp_path: Path, shared_data: Path) -> None:
    stack = Stack.open(str(shared_data / "tricky" / "ref_f32.mrcs"))
    with pytest.raises(InputError, match="image 5 was asked for but the stack holds 4"):
        stack.read([0, 4])
    assert stack.read([]).shape == (0, 128, 128)
    with mrcfile.new(tmp_path / "wide.mrcs") as file:
        file.set_data(np.zeros((2, 4, 6), np.float32))
    wide = Stack.open(str(tmp_path / "wide.mrcs"))
    assert wide.read([1]).shape == (1, 4, 6)
    with pytest.raises(InputError, match="4 × 6 pixels; particles must be square"):
        _ = wide.box_size
