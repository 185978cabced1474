"""Adding particles to a complete store: what comes out, what is refused, and what a reader sees when it is cut off."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from scalecryo.commands import convert as convert_command
from scalecryo.commands import info as info_command
from scalecryo.commands import verify as verify_command
from scalecryo.data.conversion import append as append_module
from scalecryo.data.formats import relion
from scalecryo.data.formats.mrc import Stack, StackWriter
from scalecryo.data.formats.relion.write import write_with_poses
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, ScalecryoError, StoreError

OPTIONS = {
    "data_dir": None,
    "box": None,
    "dtype": "float16",
    "workers": 2,
    "overwrite": False,
    "invert": False,
    "uninvert": False,
}
LEVELS = (44, 32)


def _convert(source: Path, store: Path | str, **options: object) -> None:
    convert_command.run(str(source), str(store), **{**OPTIONS, **options})  # type: ignore[arg-type]


def _append(source: Path, store: Path | str, **options: object) -> None:
    _convert(source, store, add=True, **options)


def _noise(count: int, box: int = 44, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (count, box, box)).astype(np.float32)


def _stack(path: Path, images: np.ndarray, pixel_size: float = 1.5) -> Path:
    with StackWriter(str(path), len(images), images.shape[-1], pixel_size) as writer:
        writer.append(images)
    return path


def _star(path: Path, stack: str, count: int, voltage: int = 300, columns: str = "") -> Path:
    head = "_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
    optics = f"data_optics\n\nloop_\n{head}1 1.5 {voltage} 2.7 0.1\n\n"
    names = "_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n_rlnMyOwn\n" + columns
    extra = " x" * len(columns.splitlines())
    rows = "".join(f"{i + 1:06d}@{stack} 1 {10000 + i} 9000 0 own{i}{extra}\n" for i in range(count))
    path.write_text(f"{optics}data_particles\n\nloop_\n{names}{rows}\n")
    return path


def _objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """300 particles in two shards of 256."""
    _convert(_stack(tmp_path / "first.mrcs", _noise(300)), tmp_path / "store", uninvert=True)
    return tmp_path / "store"


@pytest.mark.parametrize("count", [1, 211, 212, 213, 700])
def test_rows_are_those_of_both_stacks(store: Path, tmp_path: Path, count: int) -> None:
    """The last shard has room for 212 more rows: one short of it, just, one past it, and over several shards."""
    second = _stack(tmp_path / "second.mrcs", _noise(count, seed=1))
    before = ParticleStore.open(str(store))
    images = {level: before.read_images(level, 0, 300) for level in LEVELS}
    _append(second, store)
    after = ParticleStore.open(str(store))
    alone = tmp_path / "alone"
    _convert(second, alone, uninvert=True)
    new = ParticleStore.open(str(alone))
    assert after.count == 300 + count
    assert after.content_hash != before.content_hash
    group = zarr.open(store, mode="r")
    for level in LEVELS:
        assert np.array_equal(after.read_images(level, 0, 300), images[level])
        # The same images through other batches: a unit in the last place of float16 at most.
        found = after.read_images(level, 300, 300 + count).astype(np.float32)
        expected = new.read_images(level, 0, count).astype(np.float32)
        assert (np.abs(found - expected) <= 2**-10 * np.abs(expected) + 1e-5).all()
        assert np.array_equal(group[f"images/{level}"][:], after.read_images(level, 0, 300 + count))
    columns = after.read_columns(0, after.count)
    assert columns["stack"].tolist() == [0] * 300 + [1] * count
    assert columns["stack_index"].tolist() == [*range(300), *range(count)]
    assert columns["source_row"].tolist() == list(range(300 + count))
    assert after.stacks == ("first.mrcs", "second.mrcs")
    verify_command.run(str(store), full=True)
    assert not (store / "_append").exists()
    # Who opened the store before still reads what it opened.
    assert np.array_equal(before.read_images(44, 250, 300), images[44][250:])


def test_append_twice_and_info(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in (1, 2):
        _append(_stack(tmp_path / f"more{seed}.mrcs", _noise(20, seed=seed)), store)
    info_command.run(str(store))
    said = capsys.readouterr().out
    assert "340 particles" in said
    assert f"and 20 particles from {tmp_path}/more2.mrcs" in said
    assert "optics group 1: 340 particles" in said
    verify_command.run(str(store), full=True)


def test_source_tables_are_joined(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        _stack(tmp_path / f"{name}.mrcs", _noise(10, seed=seed))
    _convert(_star(tmp_path / "a.star", "a.mrcs", 10), tmp_path / "store", uninvert=True)
    _append(_star(tmp_path / "b.star", "b.mrcs", 7), tmp_path / "store")
    store = ParticleStore.open(str(tmp_path / "store"))
    source = store.source_star()
    assert source is not None
    (tmp_path / "joined.star").write_bytes(source)
    table = relion.read_particles(str(tmp_path / "joined.star"))
    assert table.image_names() == store.table().image_names()
    assert set(store.read_columns(0, 17)["optics_group"].tolist()) == {1}
    text = source.decode()
    assert text.count("data_optics") == 1
    assert "own9" in text
    out = tmp_path / "out.star"
    rotation = np.tile(np.eye(3), (17, 1, 1))
    shift = np.zeros((17, 2))
    write_with_poses(str(out), source, store.table(), rotation, shift, np.ones(17), np.ones(17, dtype=int))
    assert len(relion.read_particles(str(out))) == 17


def test_other_optics_get_other_groups(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        _stack(tmp_path / f"{name}.mrcs", _noise(10, seed=seed))
    _convert(_star(tmp_path / "a.star", "a.mrcs", 10), tmp_path / "store", uninvert=True)
    _append(_star(tmp_path / "b.star", "b.mrcs", 10, voltage=200), tmp_path / "store")
    store = ParticleStore.open(str(tmp_path / "store"))
    assert store.read_columns(0, 20)["optics_group"].tolist() == [1] * 10 + [2] * 10
    source = store.source_star()
    assert source is not None
    (tmp_path / "joined.star").write_bytes(source)
    joined = relion.read_particles(str(tmp_path / "joined.star"))
    assert joined.columns["voltage"].tolist() == [300] * 10 + [200] * 10
    assert joined.columns["optics_group"].tolist() == [1] * 10 + [2] * 10
    verify_command.run(str(tmp_path / "store"), full=True)


def test_what_does_not_fit_is_refused(store: Path, tmp_path: Path) -> None:
    before = _objects(store)
    y, x = np.mgrid[:44, :44] - 22
    blob = np.exp(-(y**2 + x**2) / 50).astype(np.float32)
    cases = [
        (_stack(tmp_path / "box.mrcs", _noise(5, 48)), {}, "box 48 px, the store's source had 44 px"),
        (_stack(tmp_path / "px.mrcs", _noise(5), 2.0), {}, r"pixel size 2 Å, the store's source had 1\.5 Å"),
        (_stack(tmp_path / "dark.mrcs", _noise(50) - 4 * blob), {}, "protein is dark: .*unlike the store's"),
        (_stack(tmp_path / "i.mrcs", _noise(5)), {"invert": True}, "--invert was given, but the store .*--uninvert"),
        (_stack(tmp_path / "clean.mrcs", np.tile(blob, (5, 1, 1))), {}, "look noise-free, the store's are noisy"),
        (tmp_path / "first.mrcs", {}, "300 of its 300 particles are in the store already, such as 000001@first.mrcs"),
    ]
    for source, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            _append(source, store, **options)
        assert "\n" not in str(caught.value)
    assert _objects(store) == before
    with pytest.raises(ScalecryoError, match="leave out --box and --overwrite"):
        _append(tmp_path / "first.mrcs", store, overwrite=True)
    _append(tmp_path / "dark.mrcs", store, uninvert=True)


class _Stop(BaseException):
    pass


def _writes_of_an_append(store: Path, source: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> int:
    """Append, but die before write number `limit`; how many writes there were."""
    writes = 0
    replace, remove = urls.os.replace, urls.remove_tree

    def count() -> None:
        nonlocal writes
        if writes == limit:
            raise _Stop
        writes += 1

    def counted_replace(*args: object) -> None:
        count()
        replace(*args)  # type: ignore[arg-type]

    def counted_remove(url: str) -> None:
        count()
        remove(url)

    monkeypatch.setattr(urls.os, "replace", counted_replace)
    monkeypatch.setattr(urls, "remove_tree", counted_remove)
    try:
        _append(source, store, workers=1)
    except _Stop:
        pass
    finally:
        monkeypatch.undo()
    return writes


def test_cut_off_before_any_write_the_old_store_is_whole(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single step: an old or the new store, sound to verify; the same append run again ends the same."""
    second = _stack(tmp_path / "second.mrcs", _noise(220, seed=1))
    other = _stack(tmp_path / "other.mrcs", _noise(3, seed=2))
    old = ParticleStore.open(str(store)).read_images(44, 0, 300)
    whole = tmp_path / "whole"
    shutil.copytree(store, whole)
    total = _writes_of_an_append(whole, second, monkeypatch, 10**9)
    expected = _objects(whole)
    other_whole = tmp_path / "other_whole"
    shutil.copytree(store, other_whole)
    _append(other, other_whole)
    assert total > 50
    # The writes of shards are alike, the last steps are not.
    for limit in [*range(0, total - 25, 8), *range(total - 25, total, 2)]:
        trial = tmp_path / "trial"
        shutil.copytree(store, trial)
        _writes_of_an_append(trial, second, monkeypatch, limit)
        found = ParticleStore.open(str(trial))
        assert found.count in (300, 520)
        assert np.array_equal(found.read_images(44, 0, 300), old), limit
        assert np.array_equal(zarr.open(trial, mode="r")["images/44"][:300], old)
        verify_command.run(str(trial), full=False)
        if found.count == 300 and limit % 5 == 0 and not (trial / "_append" / "commit.json").exists():
            # Other particles instead: nothing of the first attempt stays.
            _append(other, trial)
            assert _objects(trial) == _objects(other_whole), limit
        elif found.count == 300:
            if (trial / "_append" / "commit.json").exists():
                with pytest.raises(InputError, match="in the store already"):
                    _append(second, trial)
            else:
                _append(second, trial)
            assert _objects(trial) == expected, limit
        shutil.rmtree(trial)


def test_append_to_an_unfinished_store_is_refused(store: Path, tmp_path: Path) -> None:
    text = (store / "zarr.json").read_text().replace('"complete": true', '"complete": false')
    (store / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match="did not finish"):
        _append(_stack(tmp_path / "b.mrcs", _noise(5, seed=3)), store)
    assert append_module.PENDING not in {path.name for path in store.iterdir()}


def test_excluded_images_and_append(tmp_path: Path) -> None:
    first, second = _noise(20), _noise(20, seed=1)
    first[[3, 19]] = np.nan
    second[5] = 7.0
    for name, images in (("a", first), ("b", second)):
        _stack(tmp_path / f"{name}.mrcs", images)
    _convert(_star(tmp_path / "a.star", "a.mrcs", 20), tmp_path / "store", uninvert=True, bad_images="exclude")
    _append(_star(tmp_path / "b.star", "b.mrcs", 20), tmp_path / "store", bad_images="exclude")
    store = ParticleStore.open(str(tmp_path / "store"))
    rows = [row for row in range(40) if row not in (3, 19, 25)]
    assert store.read_columns(0, 37)["source_row"].tolist() == rows
    out = tmp_path / "out.star"
    shift = np.stack([np.arange(37.0), np.zeros(37)], axis=1)
    rotation = np.tile(np.eye(3)[[1, 2, 0]], (37, 1, 1))
    write_with_poses(str(out), store.source_star(), store.table(), rotation, shift, np.ones(37), np.ones(37, dtype=int))
    written = relion.read_particles(str(out))
    assert written.image_names() == store.table().image_names()
    # The pose of each row is its own: rlnOrigin = −shift.
    assert written.columns["shift"][:, 0] == pytest.approx(np.arange(37.0), abs=1e-4)
    assert "own19" not in out.read_text().split("b.mrcs")[0]
    assert Stack.open(str(tmp_path / "a.mrcs")).count == 20
