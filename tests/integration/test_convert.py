"""Conversion end to end: real stacks in, a store out that anyone reads, and every failure said in one line."""

import json
import shutil
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr

from scalecryo.commands import convert as convert_command
from scalecryo.commands import info as info_command
from scalecryo.commands import verify as verify_command
from scalecryo.data.conversion import convert as convert_module
from scalecryo.data.conversion import scheduler as scheduler_module
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats.mrc import Stack, StackWriter
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import sequential
from scalecryo.errors import InputError, MissingInputError, OutputExistsError, ScalecryoError, StoreError

OPTIONS = {
    "data_dir": None,
    "box": None,
    "dtype": "float16",
    "workers": 2,
    "overwrite": False,
    "invert": False,
    "uninvert": False,
}


def _convert(source: Path, store: Path | str, **options: object) -> None:
    convert_command.run(str(source), str(store), **{**OPTIONS, **options})  # type: ignore[arg-type]


def _stack(path: Path, images: np.ndarray, pixel_size: float = 1.5) -> Path:
    with StackWriter(str(path), len(images), images.shape[-1], pixel_size) as writer:
        writer.append(images)
    return path


def _noise(count: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (count, box, box)).astype(np.float32)


def _objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- real data


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 2**-11)])
def test_empiar_10076(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str, tolerance: float
) -> None:
    folder = shared_data / "particles_real" / "empiar_10076"
    _convert(folder / "empiar_10076_7.star", tmp_path / "store", dtype=dtype)
    said = capsys.readouterr()
    for part in (
        "7 particles",
        "box 320 px",
        "1.31 Å",
        "320, 128, 64, 32",
        "background",
        "protein is dark",
        "complete",
    ):
        assert part in said.out
    assert "7 of 7 particles" in said.err

    store = ParticleStore.open(str(tmp_path / "store"))
    assert (store.count, store.box_size, store.levels) == (7, 320, (320, 128, 64, 32))
    # By magnification: 10^4 · 5 µm / 38168.
    assert store.pixel_size == pytest.approx(1e4 * 5 / 38168, rel=1e-9)
    assert store.level_pixel_size(64) == pytest.approx(1.31 * 5, rel=1e-5)
    assert (store.has_ctf, store.has_pose, store.contrast) == (True, False, "protein-bright")
    assert store.source_star() == (folder / "empiar_10076_7.star").read_bytes()
    columns = store.read_columns(0, 7)
    assert columns["defocus_u"] == pytest.approx([15301.1, 15303.0, 15150.7, 15181.9, 15366.8, 15305.0, 15177.4])
    assert columns["source_row"].tolist() == list(range(7))

    source = Stack.open(str(folder / "empiar_10076_7.mrc")).read(slice(None))
    stored = store.read_images(320, 0, 7)
    assert stored.dtype == np.dtype(dtype)
    # Half a unit in the last place of the stored type, relative to each stored value (float16 below 6e-5 by 3e-8); in
    # float32 the few roundings on the way there and back, relative to the largest pixel, about 5 σ.
    undone = store.undo_normalisation(stored, columns)
    scale = columns["image_scale"][:, None, None]
    allowed = scale * (tolerance * np.abs(stored.astype(np.float32)) + (3e-6 if dtype == "float16" else 2e-6))
    assert (np.abs(undone - source) <= allowed).all()
    # Protein was dark: inverted, the centre is brighter than the background, whose mean is 0 and σ is 1.
    radius = np.hypot(*(np.mgrid[:320, :320] - 160))
    assert stored[:, radius < 80].astype(np.float64).mean() > 0.01
    background = stored[:, radius > 0.375 * 320].astype(np.float64)
    # float16 rounding averages out over 57,000 pixels.
    assert background.mean(axis=1) == pytest.approx(np.zeros(7), abs=1e-5)
    assert background.std(axis=1) == pytest.approx(np.ones(7), abs=1e-4)

    info_command.run(str(tmp_path / "store"))
    assert "7 particles, box 320 px, 1.31 Å/px" in capsys.readouterr().out
    for full in (False, True):
        verify_command.run(str(tmp_path / "store"), full=full)
        said = capsys.readouterr()
        assert "compared with the source" in said.out
        assert said.out.endswith("sound\n")


def test_cryosparc_table_gives_the_same_store(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "particles_real" / "empiar_10076"
    stores = []
    for name in ("empiar_10076_7.star", "empiar_10076_7.cs"):
        _convert(folder / name, tmp_path / name, data_dir=str(folder))
        stores.append(ParticleStore.open(str(tmp_path / name)))
    star, cs = stores
    assert np.array_equal(star.read_images(320, 0, 7), cs.read_images(320, 0, 7))
    assert cs.source_star() is None
    for name in ("stack_index", "voltage", "spherical_aberration", "amplitude_contrast", "defocus_u", "defocus_v"):
        # cryoSPARC's own import rounded the defocus to 0.1 Å (the data's README).
        assert cs.read_columns(0, 7)[name] == pytest.approx(star.read_columns(0, 7)[name], abs=0.1, rel=1e-6)


def test_levels_are_fourier_crops(shared_data: Path, tmp_path: Path) -> None:
    source = Stack.open(str(shared_data / "particles_real" / "empiar_10076" / "empiar_10076_7.mrc")).read(slice(0, 2))
    _convert(_stack(tmp_path / "two.mrcs", source, 1.31), tmp_path / "store", dtype="float32", uninvert=True)
    store = ParticleStore.open(str(tmp_path / "store"))
    full = np.fft.fft2(np.fft.ifftshift(store.read_images(320, 0, 2).astype(np.float64), axes=(1, 2)))
    for level in (128, 64, 32):
        small = np.fft.fft2(np.fft.ifftshift(store.read_images(level, 0, 2).astype(np.float64), axes=(1, 2)))
        keep = np.fft.fftfreq(level, 1 / level).astype(int)
        keep = keep[np.abs(keep) < level // 2]
        expected = full[:, keep[:, None], keep[None, :]] * level / 320
        # The orthonormal coefficient is kept, to float32: relative to the typical coefficient of σ · n.
        assert np.abs(small[:, keep[:, None], keep[None, :]] - expected).max() < 1e-5 * level * 5


def test_contrast_options(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = shared_data / "particles_real" / "empiar_10076" / "empiar_10076_7.star"
    for name, options in (("judged", {}), ("invert", {"invert": True}), ("uninvert", {"uninvert": True})):
        _convert(source, tmp_path / name, **options)
    images = {
        name: ParticleStore.open(str(tmp_path / name)).read_images(320, 0, 7)
        for name in ("judged", "invert", "uninvert")
    }
    assert np.array_equal(images["judged"], images["invert"])
    assert np.array_equal(images["judged"], -images["uninvert"])
    assert "as asked" in capsys.readouterr().out
    with pytest.raises(ScalecryoError, match="not both"):
        _convert(source, tmp_path / "x", invert=True, uninvert=True)


def test_toy_stack_without_noise(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _convert(shared_data / "toy" / "toy_projections.star", tmp_path / "toy")
    said = capsys.readouterr().out
    assert "1,000 particles" in said
    assert "no noise found" in said
    store = ParticleStore.open(str(tmp_path / "toy"))
    assert (store.count, store.levels, store.pixel_size) == (1000, (30,), 1.0)
    assert store.attrs["normalisation"] == "common"
    columns = store.read_columns(0, 1000)
    assert len(set(columns["image_scale"].tolist())) == 1
    source = Stack.open(str(shared_data / "toy" / "toy_projections.mrcs")).read(slice(None))
    undone = store.undo_normalisation(store.read_images(30, 0, 1000), columns)
    # float16: 2^-11 of each stored value; the background's mean is not 0 here.
    assert np.abs(undone - source).max() < 2**-11 * np.abs(source - columns["image_mean"][:, None, None]).max() * 1.01
    verify_command.run(str(tmp_path / "toy"), full=True)


def test_subset_in_random_order_with_a_duplicate(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "toy" / "toy_projections_13.star"
    _convert(source, tmp_path / "toy", dtype="float32")
    store = ParticleStore.open(str(tmp_path / "toy"))
    columns = store.read_columns(0, 13)
    stack = Stack.open(str(shared_data / "toy" / "toy_projections.mrcs"))
    undone = store.undo_normalisation(store.read_images(30, 0, 13), columns)
    expected = stack.read(columns["stack_index"])
    assert undone == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))
    assert store.pixel_size == 1.035


@pytest.mark.parametrize("name", ["crlf.star", "zero_padded_reversed.star", "relative_path.star"])
def test_tricky_tables(shared_data: Path, tmp_path: Path, name: str) -> None:
    _convert(shared_data / "tricky" / name, tmp_path / "s", dtype="float32")
    store = ParticleStore.open(str(tmp_path / "s"))
    source = Stack.open(str(shared_data / "tricky" / "ref_f32.mrcs")).read(slice(None))
    order = [3, 2, 1, 0] if "reversed" in name else [0, 1, 2, 3]
    undone = store.undo_normalisation(store.read_images(128, 0, 4), store.read_columns(0, 4))
    assert undone == pytest.approx(source[order], abs=1e-5)


@pytest.mark.parametrize("name", ["mode2_bigendian.mrcs", "ref_f32.mrcs.gz", "mode1_int16_x1000.mrcs"])
def test_bare_stacks(shared_data: Path, tmp_path: Path, name: str) -> None:
    _convert(shared_data / "tricky" / name, tmp_path / "s")
    store = ParticleStore.open(str(tmp_path / "s"))
    assert (store.count, store.has_ctf, store.source_star(), store.stacks) == (4, False, None, (name,))
    assert store.pixel_size == pytest.approx(1.31)
    assert len(store.table()) == 4


# ---------------------------------------------------------------- the store


def test_plain_zarr_reads_everything(tmp_path: Path) -> None:
    _convert(_stack(tmp_path / "s.mrcs", _noise(300, 44)), tmp_path / "store")
    store = ParticleStore.open(str(tmp_path / "store"))
    group = zarr.open(tmp_path / "store", mode="r")
    assert group.attrs["complete"] is True
    assert group.attrs["pixel_size"] == 1.5
    assert group.attrs["levels"] == [44, 32]
    for level in (44, 32):
        array = group[f"images/{level}"]
        assert (array.shape, array.dtype, array.shards[0], array.chunks[0]) == ((300, level, level), "float16", 256, 4)
        assert np.array_equal(array[:], store.read_images(level, 0, 300))
    for name, values in store.read_columns(0, 300).items():
        assert np.array_equal(group[f"particles/{name}"][:], values)


def test_cropped_store(tmp_path: Path) -> None:
    _convert(_stack(tmp_path / "s.mrcs", _noise(40, 64)), tmp_path / "store", box=48)
    store = ParticleStore.open(str(tmp_path / "store"))
    assert (store.box_size, store.levels, store.pixel_size) == (48, (48, 32), 2.0)
    radius = np.hypot(*(np.mgrid[:48, :48] - 24))
    background = store.read_images(48, 0, 40)[:, radius > 18].astype(np.float64)
    assert background.std(axis=1) == pytest.approx(np.ones(40), abs=1e-3)  # float16
    # The source's own table keeps the source's pixel size.
    assert store.table().pixel_size == 1.5
    verify_command.run(str(tmp_path / "store"), full=True)


def test_store_at_a_url(tmp_path: Path) -> None:
    source = _stack(tmp_path / "s.mrcs", _noise(300, 44))
    urls.write_bytes_atomic("memory://convert/s.mrcs", source.read_bytes())
    _convert(source, tmp_path / "store")
    convert_command.run("memory://convert/s.mrcs", "memory://convert/store", **OPTIONS)
    local, remote = ParticleStore.open(str(tmp_path / "store")), ParticleStore.open("memory://convert/store")
    assert local.content_hash == remote.content_hash
    for a, b in zip(
        sequential(local, 32, batch_size=70, columns=["image_scale"]),
        sequential(remote, 32, batch_size=70, columns=["image_scale"]),
        strict=True,
    ):
        assert bool((a.images == b.images).all())
        assert bool((a.columns["image_scale"] == b.columns["image_scale"]).all())
    verify_command.run("memory://convert/store", full=True)
    convert_command.run("memory://convert/s.mrcs", "memory://convert/store", **{**OPTIONS, "overwrite": True})


def test_many_stacks_in_a_project(tmp_path: Path) -> None:
    project = tmp_path / "project"
    images = _noise(30, 32)
    rows = []
    for number in range(3):
        folder = project / "Extract" / f"job{number}"
        folder.mkdir(parents=True)
        _stack(folder / "m.mrcs", images[10 * number : 10 * number + 10])
        rows += [f"{index + 1}@Extract/job{number}/m.mrcs" for index in range(10)]
    order = np.random.default_rng(0).permutation(30)
    table = project / "Select" / "job9" / "particles.star"
    table.parent.mkdir(parents=True)
    table.write_text("data_\n\nloop_\n_rlnImageName #1\n" + "".join(f"{rows[i]}\n" for i in order))
    _convert(table, tmp_path / "store", dtype="float32")
    shutil.copy(table, tmp_path / "moved.star")
    with pytest.raises(
        MissingInputError, match=r"moved\.star: its stack Extract/job\d/m\.mrcs is not at .* --data-dir"
    ):
        _convert(tmp_path / "moved.star", tmp_path / "x")
    _convert(tmp_path / "moved.star", tmp_path / "again", dtype="float32", data_dir=str(project))
    for name in ("store", "again"):
        store = ParticleStore.open(str(tmp_path / name))
        undone = store.undo_normalisation(store.read_images(32, 0, 30), store.read_columns(0, 30))
        # float32 of values around 10.
        assert undone == pytest.approx(images[order], abs=1e-5)


# ---------------------------------------------------------------- damage


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """300 particles of 44 px in two shards."""
    _convert(_stack(tmp_path / "s.mrcs", _noise(300, 44)), tmp_path / "store")
    return tmp_path / "store"


def test_flipped_byte_is_named(store: Path, capsys: pytest.CaptureFixture) -> None:
    path = store / "images/44/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"images/44/c/1/0/0 .*wrong CRC32C; damaged particles: 257 to 260"):
        verify_command.run(str(store), full=False)
    assert "257 to 260" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("images/32/c/0/0/0", "images/32/c/0/0/0 .*missing"),
        ("particles/half/c/1", "particles/half/c/1 .*missing"),
        ("images/44/zarr.json", r"images/44/zarr\.json: missing"),
        ("_manifest/00000001.json", r"00000001\.json: the manifest is missing"),
    ],
)
def test_deleted_object_is_named(store: Path, key: str, message: str) -> None:
    (store / key).unlink()
    with pytest.raises(StoreError, match=message):
        verify_command.run(str(store), full=False)


def test_source_that_changed_is_noticed(store: Path, capsys: pytest.CaptureFixture) -> None:
    images = _noise(300, 44)
    images[200] += 1.0 * _noise(1, 44, seed=5)[0]
    _stack(store.parent / "s.mrcs", images)
    with pytest.raises(StoreError, match="particle 201 of images/44 differs from its source"):
        verify_command.run(str(store), full=True)
    (store.parent / "s.mrcs").unlink()
    verify_command.run(str(store), full=True)
    assert "not compared with their source" in capsys.readouterr().err


# ---------------------------------------------------------------- interruption


class _Stop(RuntimeError):
    pass


def test_interrupted_conversion_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    again = tmp_path / "again"
    write_shard = convert_module.write_shard

    def fail_at_second(task: object) -> int:
        if task.shard == 1:  # type: ignore[attr-defined]
            raise _Stop
        return write_shard(task)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "write_shard", fail_at_second)
    monkeypatch.setattr(scheduler_module, "_TASKS_PER_WORKER", 1)  # one after the other
    with pytest.raises(_Stop):
        _convert(tmp_path / "s.mrcs", again, workers=1)
    monkeypatch.undo()
    assert (again / "_manifest/00000000.json").exists()
    with pytest.raises(StoreError, match="its conversion did not finish; run the same"):
        ParticleStore.open(str(again))
    assert ParticleStore.open(str(again), require_complete=False).count == 300
    info_command.run(str(again))
    assert "NOT complete" in capsys.readouterr().out
    with pytest.raises(StoreError, match="did not finish"):
        verify_command.run(str(again), full=False)
    with pytest.raises(OutputExistsError, match="unfinished conversion of other data or with other options"):
        _convert(tmp_path / "s.mrcs", again, dtype="float32")

    (again / "images/44/c/1/0").mkdir(parents=True)
    (again / "images/44/c/1/0/.0.1234abcd.tmp").write_bytes(b"left by a killed process")
    before = (again / "images/44/c/0/0/0").stat().st_mtime_ns
    _convert(tmp_path / "s.mrcs", again)
    assert "going on after 256 of 300" in capsys.readouterr().err
    assert (again / "images/44/c/0/0/0").stat().st_mtime_ns == before
    assert _objects(again) == _objects(store)


def test_existing_places_are_not_overwritten(store: Path, tmp_path: Path) -> None:
    before = _objects(store)
    with pytest.raises(OutputExistsError, match="a store is there already; add --overwrite"):
        _convert(tmp_path / "s.mrcs", store)
    assert _objects(store) == before
    _convert(tmp_path / "s.mrcs", store, overwrite=True, dtype="float32")
    assert ParticleStore.open(str(store)).dtype == "float32"
    # What is not a store is never removed.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("all of it")
    for place in (tmp_path / "folder", tmp_path / "s.mrcs"):
        with pytest.raises(OutputExistsError, match="is not a particle store; choose another place"):
            _convert(tmp_path / "s.mrcs", place, overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "all of it"


# ---------------------------------------------------------------- bad input


def _bad_stack(path: Path, kind: str) -> None:
    """300 noise images; something is wrong with number 288, which is not among those sampled."""
    _stack(path, _noise(300, 44))
    images = np.memmap(path, np.float32, "r+", offset=1024, shape=(300, 44, 44))
    if kind == "constant":
        images[287] = 1000.1
    else:
        images[287, 20, 21] = {"nan": np.nan, "inf": np.inf, "huge": 3e6}[kind]
    images.flush()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"image 288 of s\.mrcs: has pixels that are not finite"),
        ("inf", r"image 288 of s\.mrcs: has pixels that are not finite"),
        ("constant", r"image 288 of s\.mrcs: every pixel is 1000\.1"),
        ("huge", r"image 288 of s\.mrcs: a pixel of .* σ does not fit float16; use --dtype float32"),
    ],
)
def test_bad_pixels_are_named(tmp_path: Path, kind: str, message: str) -> None:
    _bad_stack(tmp_path / "s.mrcs", kind)
    with pytest.raises(InputError, match=message) as caught:
        _convert(tmp_path / "s.mrcs", tmp_path / "store")
    assert "\n" not in str(caught.value)
    with pytest.raises((StoreError, MissingInputError)):
        ParticleStore.open(str(tmp_path / "store"))


def _bad_source(kind: str, folder: Path, shared: Path) -> tuple[Path, dict]:
    """A source that must be refused before anything is written, and the options to convert it with."""
    header = "data_\n\nloop_\n_rlnImageName #1\n"
    table = folder / "bad.star"
    good = _stack(folder / "good.mrcs", _noise(5, 32))
    if kind == "no file":
        return folder / "none.star", {}
    if kind == "unknown kind":
        (folder / "x.txt").write_text("")
        return folder / "x.txt", {}
    if kind == "truncated":
        good.write_bytes(good.read_bytes()[:-100])
        return good, {}
    if kind == "absurd count":
        return shared / "tricky" / "header_nz_11029_but_1_image.mrcs", {}
    if kind == "no voltage":
        return shared / "tricky" / "missing_voltage_and_amplitude.star", {}
    if kind == "odd box":
        return shared / "projections_relion" / "rln_proj_65_centered.star", {}
    if kind == "no pixel size":
        return shared / "tricky" / "zero_pixel_size.mrcs", {}
    if kind == "not square":
        raw = bytearray(good.read_bytes())
        raw[4:8] = (16).to_bytes(4, "little")
        good.write_bytes(raw)
        return good, {}
    if kind == "index past the end":
        table.write_text(header + "1@good.mrcs\n6@good.mrcs\n")
    elif kind == "no stack":
        table.write_text(header + "1@good.mrcs\n1@gone.mrcs\n")
    elif kind == "two boxes":
        _stack(folder / "other.mrcs", _noise(5, 34))
        table.write_text(header + "1@good.mrcs\n1@other.mrcs\n")
    elif kind == "no rows":
        table.write_text(header + "\n")
    elif kind == "large box":
        return good, {"box": 34}
    elif kind == "odd box asked":
        return good, {"box": 31}
    return table, {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no file", r"none\.star: no such file"),
        ("unknown kind", r"x\.txt: not a known kind of particle source"),
        ("truncated", r"good\.mrcs: truncated: the header says 5 images of 32 × 32 pixels but the file ends after 4"),
        ("absurd count", "header says 11029 images"),
        ("no voltage", "column rlnVoltage, rlnAmplitudeContrast is missing"),
        ("odd box", r"box 65 px is odd; crop or pad"),
        ("no pixel size", "no pixel size, neither in the table"),
        ("not square", "16 × 32 pixels; particles must be square"),
        ("index past the end", r"asks for image 6 but the stack holds 5"),
        ("no stack", r"its stack gone\.mrcs is not at"),
        ("two boxes", r"other\.mrcs: box 34 px, but .*good\.mrcs has 32 px"),
        ("no rows", "holds no particles"),
        ("large box", "--box 34: the box must be even and at most the source's 32 px"),
        ("odd box asked", "--box 31"),
    ],
)
def test_bad_sources_write_nothing(shared_data: Path, tmp_path: Path, kind: str, message: str) -> None:
    source, options = _bad_source(kind, tmp_path, shared_data)
    with pytest.raises((InputError, MissingInputError), match=message) as caught:
        _convert(source, tmp_path / "store", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_info_on_everything(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, part in (
        ("metadata/star/relion5.star", "17 particles in 2 stacks"),
        ("metadata/cs/cryosparc_P12_J24_001_particles.cs", "2,019 particles in 50 stacks"),
        ("projections_relion/rln_proj_65.star", "no pixel size"),
        ("toy/toy_projections.mrcs", "1,000 images of 30 × 30 pixels, 1 Å"),
        ("maps/betagal_100.mrc", "map of 100³ voxels, 3.54 Å"),
    ):
        info_command.run(str(shared_data / name))
        assert part in capsys.readouterr().out
    with pytest.raises(MissingInputError, match="no such file or folder"):
        info_command.run(str(tmp_path / "none"))
    with pytest.raises(InputError, match="neither a particle store nor a run"):
        info_command.run(str(tmp_path))
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 0.5}) + "\n")
    info_command.run(str(tmp_path))
    said = capsys.readouterr().out
    assert "run, not finished" in said
    assert "step 3, loss 0.5" in said


def test_plan_hash_depends_on_what_matters(tmp_path: Path) -> None:
    source = _stack(tmp_path / "s.mrcs", _noise(20, 44))
    first = plan(str(source)).attrs["plan_hash"]
    assert plan(str(source)).attrs["plan_hash"] == first
    others = [plan(str(source), dtype="float32"), plan(str(source), sign="invert"), plan(str(source), box=40)]
    _stack(tmp_path / "s.mrcs", _noise(20, 44, seed=1))
    others.append(plan(str(source)))
    assert len({first, *(made.attrs["plan_hash"] for made in others)}) == 5


def test_scheduler_of_the_caller_is_used(store: Path, tmp_path: Path) -> None:
    with dask.config.set(scheduler="synchronous"):
        attrs = convert(plan(str(tmp_path / "s.mrcs")), str(tmp_path / "again"))
    assert attrs["content_hash"] == ParticleStore.open(str(store)).content_hash


def test_progress_is_reported_from_zero_to_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = plan(str(_stack(tmp_path / "s.mrcs", _noise(300, 44))))
    convert(made, str(tmp_path / "store"), workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 300)
    assert seen[-1] == (300, 300)
