"""Conversion by the processes of a `distributed` cluster: the same bytes as by this process's threads."""

from pathlib import Path

import numpy as np
import pytest

from scalecryo.commands import convert as convert_command
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.errors import InputError

OPTIONS = {
    "data_dir": None,
    "box": None,
    "dtype": "float16",
    "workers": 2,
    "overwrite": False,
    "invert": False,
    "uninvert": True,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def _stack(path: Path, images: np.ndarray) -> Path:
    with StackWriter(str(path), len(images), images.shape[-1], 1.5) as writer:
        writer.append(images)
    return path


def test_cluster_writes_the_same_bytes(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    images = np.random.default_rng(0).normal(3, 2, (2000, 44, 44)).astype(np.float32)
    source = _stack(tmp_path / "s.mrcs", images)
    bad = images[:600].copy()
    bad[500] = np.nan
    broken = _stack(tmp_path / "bad.mrcs", bad)
    convert_command.run(str(source), str(tmp_path / "threads"), **OPTIONS)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        convert_command.run(str(source), str(tmp_path / "cluster"), scheduler=address, **OPTIONS)
        # A worker's error reaches the caller as it is here.
        with pytest.raises(InputError, match=r"image 501 of bad\.mrcs: has pixels that are not finite"):
            convert_command.run(str(broken), str(tmp_path / "bad"), scheduler=address, **OPTIONS)
        convert_command.run(
            str(broken),
            str(tmp_path / "good"),
            scheduler=address,
            bad_images="exclude",
            **{**OPTIONS, "overwrite": True},
        )
    assert _objects(tmp_path / "cluster") == _objects(tmp_path / "threads")


def test_no_scheduler_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("scalecryo.data.conversion.scheduler._CONNECT_SECONDS", 1)
    source = _stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(8, 44, 44)).astype(np.float32))
    with pytest.raises(InputError, match=r"--scheduler tcp://127\.0\.0\.1:9: no dask scheduler answers there"):
        convert_command.run(str(source), str(tmp_path / "s"), scheduler="tcp://127.0.0.1:9", **OPTIONS)
