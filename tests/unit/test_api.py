"""The public Python API, on the simulated set; and the examples of its documentation, which are run as they stand."""

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import scalecryo
from scalecryo.api import torch_dataset
from scalecryo.commands.recipe_files import recipe_file
from scalecryo.data.formats import relion
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, MissingInputError, StoreError, UsageError
from tests.conftest import SimulatedParticles


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, scalecryo; assert 'open_store' in dir(scalecryo); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scalecryo.nothing  # type: ignore[attr-defined]


def test_rows_are_those_that_were_asked_for(simulated: SimulatedParticles) -> None:
    store = scalecryo.open_store(simulated.posed_store)
    assert (len(store), store.box_size, store.pixel_size) == (simulated.count, simulated.box_size, 3.2)
    assert "300 particles" in repr(store)
    whole = ParticleStore.open(simulated.posed_store).read_images(32, 0, 300).astype(np.float32)
    truth = relion.read_particles(str(simulated.folder / "truth.star"))
    for rows, expected in (
        (7, [7]), (-1, [299]), (slice(10, 40, 7), [10, 17, 24, 31, 38]), ([250, 3, 3, -2], [250, 3, 3, 298]),
        (np.arange(0), []),
    ):  # fmt: skip
        found = store[rows]
        assert found.rows.tolist() == expected
        assert len(found) == len(expected)
        np.testing.assert_array_equal(found.images, whole[expected])
        if not len(expected):
            continue
        for name in ("defocus_u", "voltage"):
            np.testing.assert_allclose(found.ctf[name], truth.columns[name][expected], rtol=1e-6)
        assert found.rotation is not None
        np.testing.assert_allclose(found.rotation, truth.columns["rotation"][expected], atol=1e-6)
    np.testing.assert_allclose(store.columns("shift")["shift"], truth.columns["shift"], atol=1e-5)


def test_what_a_store_does_not_hold_is_refused(simulated: SimulatedParticles) -> None:
    store = scalecryo.open_store(simulated.store)
    assert store[0].rotation is None
    assert not store.has_poses
    with pytest.raises(InputError, match="no row 300"):
        store[300]
    with pytest.raises(StoreError, match="no level 48"):
        store.read(0, level=48)
    with pytest.raises(MissingInputError):
        scalecryo.open_store(str(simulated.folder / "nothing.zarr"))


def test_a_dataloader_gets_every_row_once(simulated: SimulatedParticles) -> None:
    store = scalecryo.open_store(simulated.posed_store)
    plain = list(DataLoader(store.torch_dataset(), batch_size=64))
    assert torch.cat([batch["row"] for batch in plain]).tolist() == list(range(300))
    assert plain[0]["image"].shape == (64, 32, 32)
    assert plain[0]["image"].dtype == torch.float32
    assert plain[0]["rotation"].shape == (64, 3, 3)
    np.testing.assert_array_equal(plain[0]["image"].numpy(), store[:64].images)
    shuffled = store.torch_dataset(shuffle=True, seed=1)
    orders = []
    for epoch in (0, 0, 1):
        shuffled.set_epoch(epoch)
        orders.append([int(one["row"]) for one in shuffled])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(300))


def test_workers_of_a_dataloader_share_the_blocks(
    simulated: SimulatedParticles, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = scalecryo.open_store(simulated.posed_store).torch_dataset(shuffle=True)
    monkeypatch.setattr(dataset, "_block", 32)
    seen: list[int] = []
    for number in range(3):
        worker = type("Worker", (), {"id": number, "num_workers": 3})()
        monkeypatch.setattr(torch_dataset, "get_worker_info", lambda worker=worker: worker)
        own = [int(one["row"]) for one in dataset]
        assert 64 <= len(own) <= 128
        seen += own
    assert sorted(seen) == list(range(300))


def test_the_documentation_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (files("scalecryo") / "docs" / "python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "python.md", "exec"), names)
    run = scalecryo.open_run(str(tmp_path / "run"))
    assert run.resolution is not None
    assert run.resolution < 8  # Nyquist is 6.4 Å, and the poses are known
    assert run.config.pose.source == "known"
    poses = run.poses()
    truth = relion.read_poses(str(tmp_path / "data" / "truth.star"))
    np.testing.assert_allclose(poses["rotation"], truth.rotation, atol=1e-5)
    frame = run.metrics().to_pandas()
    assert list(frame["step"]) == [1]
    assert len(run.fsc()["shell"]) == 17
    assert len(run.fsc_cones().to_pandas()) == 128
    assert run.map("mask").density.max() <= 1
    with pytest.raises(MissingInputError, match=r"map\.mrc is not there"):
        run.map(class_number=2)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        scalecryo.open_run(str(tmp_path))
    (tmp_path / "config.toml").write_text("")
    run = scalecryo.open_run(str(tmp_path))
    assert run.resolution is None
    assert "not finished" in repr(run)
    assert len(run.metrics()["step"]) == 0
    with pytest.raises(MissingInputError, match="not finished"):
        run.poses()


def test_recipes_come_by_name() -> None:
    found = recipe_file("paper-known", None)
    assert found is not None
    assert 'source = "known"' in Path(found).read_text()
    assert recipe_file(None, "a.toml") == "a.toml"
    with pytest.raises(UsageError, match="paper-known"):
        recipe_file("paper-unknown", None)
    with pytest.raises(UsageError, match="not both"):
        recipe_file("guided", "a.toml")


@pytest.mark.parametrize("name", ["look_into_a_store", "poses_to_map"])
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cells one after the other, without Jupyter."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((files("scalecryo") / "docs" / f"{name}.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    assert plt.get_fignums()
    plt.close("all")
