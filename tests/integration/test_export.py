"""`scalecryo export`: what RELION, cryoSPARC and cryoDRGN will be given. Conventions are tested with the writers."""

import io
import json
import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from scalecryo.commands import export, simulate
from scalecryo.data.conversion.append import append
from scalecryo.data.conversion.append_plan import plan_append
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, MissingInputError, OutputExistsError

MAPS = ["half1.mrc", "half2.mrc", "map.mrc", "map_unsharpened.mrc", "mask.mrc"]


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a finished run that export reads, with known poses."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    simulate.run(
        str(shared_data / "structures" / "1ubi.pdb"), str(data), n=20, box=32, pixel_size=2.0, snr_db=None,
        defocus_um=(0.5, 1.0), astigmatism_um=0.1, shift_a=3.0, seed=0,
    )  # fmt: skip
    truth = relion.read_particles(str(data / "truth.star"))
    relion.write_with_poses(
        str(run / "particles.star"), (data / "particles.star").read_bytes(), truth,
        truth.columns["rotation"], truth.columns["shift"], np.linspace(0, 1, 20), np.arange(20) % 2 + 1,
    )  # fmt: skip
    volume = mrcfile.read(data / "truth.mrc")
    for name in MAPS:
        with mrcfile.new(run / name) as file:
            file.set_data(volume)
            file.voxel_size = 2.0
            file.header.origin = (-31.5, 4.0, 8.25)
    return run


@pytest.mark.parametrize(
    ("format", "tables"),
    [
        ("relion", ["particles.star"]),
        ("cryosparc", ["particles.cs", "particles.csg"]),
        ("cryodrgn", ["ctf.pkl", "poses.pkl"]),
    ],
)
def test_files_and_maps(run: Path, tmp_path: Path, format: str, tables: list[str]) -> None:
    out = tmp_path / "out"
    export.run(str(run), format=format, out=str(out))
    assert sorted(path.name for path in out.iterdir()) == sorted([*MAPS, *tables])
    for name in MAPS:
        assert mrcfile.validate(out / name)
        with mrcfile.open(out / name) as file:
            assert float(file.voxel_size.x) == pytest.approx(2.0)
            assert [float(file.header.origin[axis]) for axis in "xyz"] == [-31.5, 4.0, 8.25]
            np.testing.assert_array_equal(file.data, mrcfile.read(run / name))


def test_three_packages_are_given_the_same_poses(run: Path, tmp_path: Path) -> None:
    for format in ("relion", "cryosparc", "cryodrgn"):
        export.run(str(run), format=format, out=str(tmp_path / format))
    star = relion.read_particles(str(tmp_path / "relion" / "particles.star"))
    sparc = cryosparc.read_particles(str(tmp_path / "cryosparc" / "particles.cs"))
    rotation, translation = pickle.load(io.BytesIO((tmp_path / "cryodrgn" / "poses.pkl").read_bytes()))
    # Single precision, and six decimals of a degree in the STAR file.
    np.testing.assert_allclose(sparc.columns["rotation"], star.columns["rotation"], atol=2e-6)
    np.testing.assert_allclose(rotation.transpose(0, 2, 1), star.columns["rotation"], atol=2e-6)
    np.testing.assert_allclose(sparc.columns["shift"], star.columns["shift"], atol=1e-5)
    np.testing.assert_allclose(-translation * 32 * 2.0, star.columns["shift"], atol=1e-5)
    for name in ("defocus_u", "defocus_v", "astigmatism_angle", "half", "stack_index"):
        np.testing.assert_allclose(sparc.columns[name], star.columns[name], rtol=1e-5, err_msg=name)
    assert sparc.stacks == star.stacks
    table = np.load(io.BytesIO((tmp_path / "cryosparc" / "particles.cs").read_bytes()), allow_pickle=False)
    np.testing.assert_allclose(table["alignments3D/class_posterior"], np.linspace(0, 1, 20), atol=1e-5)
    assert set(table["blob/sign"]) == {1}


def test_relion_gets_the_table_unchanged(run: Path, tmp_path: Path) -> None:
    export.run(str(run), format="relion", out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "particles.star").read_bytes() == (run / "particles.star").read_bytes()
    blocks = starfile.read(tmp_path / "out" / "particles.star", always_dict=True)
    assert {"optics", "particles"} <= set(blocks)


def test_particles_without_a_ctf(run: Path, tmp_path: Path) -> None:
    table = relion.read_particles(str(run / "particles.star"))
    kept = {name: values for name, values in table.columns.items() if name not in cryosparc.CTF_COLUMNS}
    bare = tmp_path / "run"
    bare.mkdir()
    plain = type(table)(table.pixel_size, table.stacks, kept)
    relion.write_particles(str(bare / "particles.star"), plain.image_names(), plain, with_poses=True)
    (bare / "map.mrc").write_bytes((run / "map.mrc").read_bytes())
    export.run(str(bare), format="cryodrgn", out=str(tmp_path / "dragon"))
    assert sorted(path.name for path in (tmp_path / "dragon").iterdir()) == ["map.mrc", "poses.pkl"]
    export.run(str(bare), format="cryosparc", out=str(tmp_path / "sparc"))
    assert not cryosparc.read_particles(str(tmp_path / "sparc" / "particles.cs")).has_ctf


def test_protein_dark_stacks_are_said_to_be(run: Path, tmp_path: Path) -> None:
    """The run's store knows the contrast of its source; cryoSPARC calls protein-dark −1 (EMPIAR-10076's own table)."""
    dark = tmp_path / "run"
    dark.mkdir()
    for name in ("particles.star", "map.mrc"):
        (dark / name).write_bytes((run / name).read_bytes())
    store = tmp_path / "store.zarr"
    store.mkdir()
    (store / "zarr.json").write_text(json.dumps({"attributes": {"scalecryo_version": "0", "sign": -1}}))
    (dark / "config.toml").write_text(f'[run]\ndata = "{store}"\n')
    export.run(str(dark), format="cryosparc", out=str(tmp_path / "out"))
    assert set(np.load(io.BytesIO((tmp_path / "out" / "particles.cs").read_bytes()))["blob/sign"]) == {-1}


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="scalecryo assign"):
        export.run(str(tmp_path), format="relion", out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="choose relion"):
        export.run(str(run), format="eman", out=str(tmp_path / "out"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        export.run(str(run), format="relion", out=str(full))


def _cs_store(folder: Path, count: int = 20, sign: float = -1.0) -> tuple[Path, np.ndarray]:
    """A store of protein-dark images with cryoSPARC's own uids and fields."""
    with StackWriter(str(folder / "a.mrc"), count, 32, 1.5) as writer:
        writer.append(np.random.default_rng(0).normal(3, 2, (count, 32, 32)))
    rows = csrows.build(count, {
        "uid": np.random.default_rng(1).integers(1, 2**63, count).astype(np.uint64),
        "blob/path": np.full(count, b"a.mrc"), "blob/idx": np.arange(count, dtype=np.uint32),
        "blob/psize_A": np.full(count, 1.5, np.float32), "blob/sign": np.full(count, sign, np.float32),
        "location/micrograph_uid": np.arange(count, dtype=np.uint64) + 2**40,
    })  # fmt: skip
    (folder / "p.cs").write_bytes(csrows.encode(rows))
    convert(plan(str(folder / "p.cs")), str(folder / "store.zarr"))
    return folder / "store.zarr", rows


def _run_of(store: Path, run: Path) -> Path:
    """The files of a run on a store that export reads."""
    run.mkdir()
    opened = ParticleStore.open(str(store))
    table, count = opened.table(), opened.count
    rotation = Rotation.random(count, np.random.default_rng(2)).as_matrix()
    relion.write_with_poses(
        str(run / "particles.star"), opened.source_star(), table, rotation, np.ones((count, 2)), np.ones(count),
        np.arange(count) % 2 + 1, 32,
    )  # fmt: skip
    with mrcfile.new(run / "map.mrc") as file:
        file.set_data(np.zeros((32, 32, 32), np.float32))
        file.voxel_size = 1.5
    (run / "config.toml").write_text(f'[run]\ndata = "{store}"\n')
    return run


def test_a_store_that_was_moved(tmp_path: Path) -> None:
    """Only the store knows uids, fields and sign: exported without it they would be made up."""
    store, rows = _cs_store(tmp_path)
    run = _run_of(store, tmp_path / "run")
    store.rename(tmp_path / "moved.zarr")
    with pytest.raises(MissingInputError, match=r"store\.zarr: the run's store is not there, .* new place by --data"):
        export.run(str(run), format="cryosparc", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    export.run(str(run), format="relion", out=str(tmp_path / "relion"))  # which needs nothing of it
    export.run(str(run), format="cryosparc", out=str(tmp_path / "out"), data=str(tmp_path / "moved.zarr"))
    found = np.load(tmp_path / "out" / "particles.cs")
    for name in rows.dtype.names or ():
        assert found[name].tolist() == rows[name].tolist(), name
    # Another store in its place is refused, not taken for it.
    other = tmp_path / "other"
    other.mkdir()
    another, _ = _cs_store(other, count=12)
    another.rename(store)
    with pytest.raises(InputError, match="holds other particles than the run"):
        export.run(str(run), format="cryosparc", out=str(tmp_path / "again"))


def test_a_store_that_grew_since(tmp_path: Path) -> None:
    store, rows = _cs_store(tmp_path)
    run = _run_of(store, tmp_path / "run")
    with StackWriter(str(tmp_path / "b.mrc"), 4, 32, 1.5) as writer:
        writer.append(np.random.default_rng(3).normal(3, 2, (4, 32, 32)))
    more = rows[:4].copy()
    more["blob/path"], more["uid"] = b"b.mrc", more["uid"] + np.uint64(1)
    (tmp_path / "q.cs").write_bytes(csrows.encode(more))
    append(plan_append(str(tmp_path / "q.cs"), str(store)))
    export.run(str(run), format="cryosparc", out=str(tmp_path / "out"))
    assert np.load(tmp_path / "out" / "particles.cs")["uid"].tolist() == rows["uid"].tolist()
