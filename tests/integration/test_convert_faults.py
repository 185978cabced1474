"""What a conversion survives: kill −9, a full disk, another conversion, a source that changes, images that are bad."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from scalecryo.commands import convert as convert_command
from scalecryo.commands import info as info_command
from scalecryo.commands import verify as verify_command
from scalecryo.data.conversion import convert as convert_module
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.io import lock, urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, OutputError, OutputExistsError, StoreError

OPTIONS = {
    "data_dir": None,
    "box": None,
    "dtype": "float16",
    "workers": 2,
    "overwrite": False,
    "invert": False,
    "uninvert": True,
}


def _convert(source: Path, store: Path | str, **options: object) -> None:
    convert_command.run(str(source), str(store), **{**OPTIONS, **options})  # type: ignore[arg-type]


def _stack(path: Path, images: np.ndarray) -> Path:
    with StackWriter(str(path), len(images), images.shape[-1], 1.5) as writer:
        writer.append(images)
    return path


def _noise(count: int, box: int = 44, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (count, box, box)).astype(np.float32)


def _objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


# Children are forked from a process that has planned and has one thread: another thread's locks would stay locked in a
# child for ever. What is killed is mostly the writing.
_KILLER = """
import json, os, random, signal, sys, time, traceback
from scalecryo.data.conversion.convert import convert, plan
source, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
made = plan(source)
assert len(os.listdir("/proc/self/task")) == 1

def child(store):
    pid = os.fork()
    if pid == 0:
        try:
            convert(made, store, workers=2)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid

def complete(store):
    path = store + "/zarr.json"
    return os.path.exists(path) and json.load(open(path))["attributes"]["complete"]

assert os.waitpid(child(folder + "/whole"), 0)[1] == 0
started = time.monotonic()
assert os.waitpid(child(folder + "/again"), 0)[1] == 0
whole = time.monotonic() - started
moments, stores, store = random.Random(0), [], None
while kills:
    if store is None:
        store = f"{folder}/store{len(stores)}"
        stores.append(store)
    pid = child(store)
    time.sleep(moments.uniform(0.3, 0.9) * whole)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        kills -= 1
    else:
        assert status == 0, status
    if complete(store):  # it may have been killed between its last write and its end
        store = None
for store in stores:
    if not complete(store):
        assert os.waitpid(child(store), 0)[1] == 0
"""


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    source = _stack(tmp_path / "s.mrcs", _noise(3000))
    command = [sys.executable, "-c", _KILLER, str(source), str(tmp_path), "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = _objects(tmp_path / "whole")
    stores = sorted(tmp_path.glob("store*"))
    assert stores
    for store in stores:
        found = _objects(store)
        # Killed after its last write: the system has dropped the lock, its empty file is left.
        assert found.pop("_lock", b"") == b""
        assert found == whole
    verify_command.run(str(stores[0]), full=False)


def test_full_disk_is_said_and_the_conversion_goes_on(tmp_path: Path) -> None:
    """A limit on the length of files stands for a full disk: the write itself fails, in the middle of a shard."""
    source = _stack(tmp_path / "s.mrcs", _noise(300))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(
            OutputError, match=r"c/0/0/0: no room to write it .*; make room, then run the same"
        ) as caught:
            _convert(source, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "store").rglob(".*.tmp"))
    with pytest.raises(StoreError, match="did not finish"):
        ParticleStore.open(str(tmp_path / "store"))
    _convert(source, tmp_path / "store")
    _convert(source, tmp_path / "fresh")
    assert _objects(tmp_path / "store") == _objects(tmp_path / "fresh")


@pytest.mark.parametrize("other_seed", [0, 1])
def test_of_two_conversions_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_seed: int
) -> None:
    """The same source or another one: the second is told, the first ends as if alone."""
    first, second = plan(str(_stack(tmp_path / "a.mrcs", _noise(600)))), None
    second = plan(str(_stack(tmp_path / f"b{other_seed}.mrcs", _noise(600, seed=other_seed))))
    begun, go_on = threading.Event(), threading.Event()
    write_shard = convert_module.write_shard

    def wait(task: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return write_shard(task)  # type: ignore[arg-type]

    store = str(tmp_path / "store")
    monkeypatch.setattr(convert_module, "write_shard", wait)
    runner = threading.Thread(target=convert, args=(first, store), kwargs={"workers": 1})
    runner.start()
    assert begun.wait(30)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="another conversion is writing this store"):
            convert(second, store, workers=1, overwrite=overwrite)
    go_on.set()
    runner.join(60)
    monkeypatch.undo()
    convert(first, str(tmp_path / "alone"), workers=1)
    assert _objects(tmp_path / "store") == _objects(tmp_path / "alone")


def test_race_for_one_place(tmp_path: Path) -> None:
    """Two start together, again and again: one ends, the other is told so in a line, and nothing is mixed."""
    plans = [plan(str(_stack(tmp_path / f"{seed}.mrcs", _noise(300, seed=seed)))) for seed in (0, 1)]
    alone = []
    for number, made in enumerate(plans):
        convert(made, str(tmp_path / f"alone{number}"), workers=1)
        alone.append(_objects(tmp_path / f"alone{number}"))
    for trial in range(10):
        store, together, lost = tmp_path / f"store{trial}", threading.Barrier(2), {}

        def run(number: int, store: Path = store, together: threading.Barrier = together, lost: dict = lost) -> None:
            together.wait()
            try:
                convert(plans[number], str(store), workers=1)
            except (OutputError, OutputExistsError) as error:
                lost[number] = str(error)

        runners = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join(60)
        assert len(lost) == 1, lost
        assert "another conversion is writing" in (message := lost.popitem()[1]) or "already" in message
        assert _objects(store) in alone


def test_claims_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://claims/store"
    with lock.writing(url, "a") as renew:
        renew()
        with pytest.raises(OutputError, match="another conversion is writing"), lock.writing(url, "b"):
            pass
        with lock.writing(url, "a"):  # the same plan writes the same bytes
            pass
        # Silent for long: a killed one.
        monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.0)
        with lock.writing(url, "b"), pytest.raises(OutputError, match="another conversion is writing"):
            renew()
    assert not urls.exists(f"{url}/_lock")


def test_overwriting_is_never_half_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off while the old store is removed: not readable as either, and replaced by the next attempt."""
    first = _stack(tmp_path / "a.mrcs", _noise(300))
    _convert(first, tmp_path / "store")
    remove, calls = urls.remove_tree, []

    def cut_off(url: str) -> None:
        calls.append(url)
        if len(calls) == 3:
            raise KeyboardInterrupt
        remove(url)

    monkeypatch.setattr(urls, "remove_tree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        _convert(first, tmp_path / "store", overwrite=True, dtype="float32")
    monkeypatch.undo()
    with pytest.raises(StoreError):
        ParticleStore.open(str(tmp_path / "store"))
    with pytest.raises(OutputExistsError, match="add --overwrite"):
        _convert(first, tmp_path / "store", dtype="float32")
    _convert(first, tmp_path / "store", overwrite=True, dtype="float32")
    verify_command.run(str(tmp_path / "store"), full=True)


@pytest.mark.parametrize("when", ["before", "within", "removed"])
def test_source_replaced_between_plan_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    source = _stack(tmp_path / "s.mrcs", _noise(600))
    made = plan(str(source))

    def replaced() -> None:
        if when == "removed":
            source.unlink()
        else:
            _stack(source, _noise(600, seed=1))

    if when == "within":
        from scalecryo.data.conversion import shard_task

        normalise, calls = shard_task.normalise, []

        def slow(*args: object) -> object:
            calls.append(None)
            if len(calls) == 3:
                time.sleep(0.02)  # file systems count time in steps of some milliseconds
                replaced()
            return normalise(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(shard_task, "normalise", slow)
    else:
        replaced()
    with pytest.raises(InputError, match=r"s\.mrcs: was changed after the conversion had looked at it") as caught:
        convert(made, str(tmp_path / "store"), workers=1)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="did not finish"):
        ParticleStore.open(str(tmp_path / "store"))
    if when != "removed":
        _convert(source, tmp_path / "store", overwrite=True)
        verify_command.run(str(tmp_path / "store"), full=True)


# ---------------------------------------------------------------- bad images


def _bad_noise() -> np.ndarray:
    """600 images: 3 of them sampled by every plan (the first), others not; all kinds of damage."""
    images = _noise(600)
    images[0, 3, 4] = np.nan
    images[287, 20, 21] = np.inf
    images[288] = 1000.1
    images[400, 20, 21] = 3e6
    images[401, :, :] = 0.0
    images[401, 20:24, 20:24] = 1.0
    return images


BAD = [0, 287, 288, 400, 401]


def test_bad_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = _bad_noise()
    _convert(_stack(tmp_path / "s.mrcs", images), tmp_path / "store", bad_images="exclude", dtype="float16")
    said = capsys.readouterr()
    assert "left out 5: image 1 of s.mrcs: has pixels that are not finite; image 288 of s.mrcs" in said.err
    assert "left out: 5 images that cannot be stored" in said.out
    good = np.setdiff1d(np.arange(600), BAD)
    _convert(_stack(tmp_path / "good.mrcs", images[good]), tmp_path / "good")
    store, expected = (ParticleStore.open(str(tmp_path / name)) for name in ("store", "good"))
    for level in store.levels:
        assert np.array_equal(store.read_images(level, 0, 595), expected.read_images(level, 0, 595))
    assert store.read_columns(0, 595)["source_row"].tolist() == good.tolist()
    assert store.attrs["excluded"] == 5
    listed = json.loads((tmp_path / "store" / "source" / "excluded.json").read_text())
    assert [item["source_row"] for item in listed] == BAD
    assert [item["problem"] for item in listed] == [
        "has pixels that are not finite",
        "has pixels that are not finite",
        "every pixel is 1000.1",
        listed[3]["problem"],
        "its background is flat while others have noise",
    ]
    assert "σ does not fit float16" in listed[3]["problem"]
    verify_command.run(str(tmp_path / "store"), full=True)
    info_command.run(str(tmp_path / "store"))
    assert "left out: 5 images" in capsys.readouterr().out


def test_bad_images_are_listed_when_refused(tmp_path: Path) -> None:
    images = _noise(300)
    images[0] = 1.0
    source = _stack(tmp_path / "s.mrcs", images)
    with pytest.raises(InputError, match=r"image 1 of s\.mrcs: every pixel is 1; .*--bad-images exclude"):
        plan(str(source))  # the first image is among those sampled
    images = _noise(300)
    images[[1, 3, 5, 6, 8, 10, 12]] = 1.0  # these are not
    _stack(source, images)
    with pytest.raises(InputError) as caught:
        _convert(source, tmp_path / "store")
    named = "; ".join(f"image {number} of s.mrcs: every pixel is 1" for number in (2, 4, 6, 7, 9))
    assert str(caught.value) == f"{named}; and 2 more; leave out such images by --bad-images exclude"
    zeros = _stack(tmp_path / "zeros.mrcs", np.zeros((3, 44, 44), np.float32))
    with pytest.raises(InputError, match="every pixel is 0"):
        _convert(zeros, tmp_path / "x", bad_images="exclude")


def test_duplicates_and_groups_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = _noise(60)
    images[40] = images[7]
    y, x = np.mgrid[:44, :44] - 22
    blob = 4 * np.exp(-(y**2 + x**2) / 50).astype(np.float32)
    images[:30] += blob
    images[30:] -= blob
    images[40] = images[37]
    _stack(tmp_path / "s.mrcs", images)
    names = ("OpticsGroup", "ImagePixelSize", "Voltage", "SphericalAberration", "AmplitudeContrast")
    names = "data_optics\n\nloop_\n" + "".join(f"_rln{name}\n" for name in names)
    optics = "".join(f"{group} 1.5 300 2.7 0.1\n" for group in (1, 2))
    head = "\ndata_particles\n\nloop_\n_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n"
    rows = "".join(f"{i + 1}@s.mrcs {1 + i // 30} 10000 9000 0\n" for i in [*range(60), 12])
    (tmp_path / "p.star").write_text(names + optics + head + rows)
    _convert(tmp_path / "p.star", tmp_path / "store")
    said = capsys.readouterr().out
    assert "optics group 1: 31 particles, background 3" in said
    assert "optics groups differ in contrast" in said
    assert "1 particles named twice in the table, such as image 13 of s.mrcs" in said
    assert "1 particles with the very pixels of another image, such as image 41 of s.mrcs" in said
    report = json.loads((tmp_path / "store" / "source" / "report.json").read_text())
    groups = report["optics_groups"]
    assert [group["sign"] for group in groups] == [1, -1]
    # Outside the circle the blob has vanished: the noise's own mean and σ, medians of 30 images of 500 pixels.
    assert [group["background_mean"] for group in groups] == pytest.approx([3, 3], abs=0.1)
    assert [group["scale"] for group in groups] == pytest.approx([2, 2], abs=0.1)
