"""The guided method given particles that it cannot use, or only partly: one clear word, never a wrong structure."""

import json
import re
from importlib.resources import as_file, files
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from scalecryo.commands import convert, evaluate, simulate, train
from scalecryo.data.formats.relion import read_poses
from scalecryo.errors import TrainingError

COUNT, BOX, PIXEL_SIZE = 1200, 32, 3.2
QUICK = {"guided.bootstrap_steps": "40", "guided.starts": "1", "guided.shift_radius_a": "4"}
BRIEF = {"guided__bootstrap_steps": "12", "guided__bootstrap_rounds": "1", "guided__iterations": "1",
         "guided__encoder_steps": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy, shifted particles of 4AKE with CTF, and their truth."""
    folder = tmp_path_factory.mktemp("bad_particles") / "data"
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(folder), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=0.0,
                     defocus_um=(1.0, 2.5), astigmatism_um=0.0, shift_a=1.5, seed=5)  # fmt: skip
    return folder


def changed(good: Path, folder: Path, *, images: np.ndarray | None = None, count: int = COUNT,
            pixel_size: float = PIXEL_SIZE, ctf: bool = True) -> str:  # fmt: skip
    """A table like the good one, with something wrong."""
    folder.mkdir()
    blocks = starfile.read(good / "particles.star", always_dict=True)
    optics, particles = blocks["optics"], blocks["particles"][:count].copy()
    optics["rlnImagePixelSize"] = pixel_size
    if not ctf:
        particles = particles.drop(columns=[name for name in particles if "Defocus" in name])
        optics = optics.drop(columns=["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"])
    starfile.write({"optics": optics, "particles": pd.DataFrame(particles)}, folder / "particles.star")
    if images is None:
        (folder / "particles.mrcs").symlink_to(good / "particles.mrcs")
    else:
        with mrcfile.new(str(folder / "particles.mrcs")) as stack:
            stack.set_data(images.astype(np.float32))
            stack.set_image_stack()
    return str(folder / "particles.star")


def pixels_of(good: Path) -> np.ndarray:
    with mrcfile.open(str(good / "particles.mrcs")) as stack:
        return np.array(stack.data)


def run_on(table: str, folder: Path, **extra: str) -> Path:
    store = str(folder / "store.zarr")
    convert.run(table, store, data_dir=None, box=None, dtype="float16", workers=1, overwrite=False, invert=False,
                uninvert=True)  # fmt: skip
    overrides = QUICK | {key.replace("__", "."): value for key, value in extra.items()}
    out = folder / "run"
    train.run(None, data=store, out=str(out), workers="0", device="cpu", resume=False, overrides=overrides)
    return out


def test_images_all_alike_are_refused(good: Path, tmp_path: Path) -> None:
    images = np.repeat(pixels_of(good)[:1], COUNT, axis=0)
    with pytest.raises(TrainingError, match="all alike"):
        run_on(changed(good, tmp_path / "data", images=images), tmp_path)


def test_too_few_particles_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="60 particles"):
        run_on(changed(good, tmp_path / "data", count=60), tmp_path)


def test_inverted_contrast_that_convert_was_told_to_keep_is_noticed(good: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="contrast seems inverted"):
        run_on(changed(good, tmp_path / "data", images=-pixels_of(good)), tmp_path, **BRIEF)
    assert not (tmp_path / "run" / "map.mrc").exists()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_pixel_size_is_noticed_by_the_ctf(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    run_on(changed(good, tmp_path / "data", pixel_size=factor * PIXEL_SIZE), tmp_path, **BRIEF)
    assert "does not follow the CTFs" in capsys.readouterr().err
    assert (tmp_path / "run" / "map.mrc").exists()


def test_right_ctfs_give_no_warning_and_missing_ones_are_said(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on(changed(good, tmp_path / "data"), tmp_path, **BRIEF, train__final_pass="false")
    assert "does not follow" not in capsys.readouterr().err
    (tmp_path / "without").mkdir()
    run_on(changed(good, tmp_path / "without" / "data", ctf=False), tmp_path / "without", **BRIEF)
    assert "carry no CTF" in capsys.readouterr().err
    assert (tmp_path / "without" / "run" / "map.mrc").exists()


def test_junk_gets_low_confidence_and_does_not_ruin_the_map(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A fifth of the images are noise of the same background. Reference: which ones, and the simulated map.
    images = pixels_of(good)
    junk = np.arange(COUNT) % 5 == 2
    sigma = images[:, 0].std()
    images[junk] = np.random.default_rng(0).normal(0, sigma, (junk.sum(), BOX, BOX))
    run = run_on(
        changed(good, tmp_path / "data", images=images), tmp_path, guided__bootstrap_rounds="2", guided__iterations="4"
    )
    # Told at the end and at the top of the page.
    for told in (capsys.readouterr().err, (run / "report.html").read_text()):
        assert re.search(r"(19|20|21|22)% of the images do not fit the map", told)
    confidence = read_poses(str(run / "particles.star")).confidence
    assert confidence is not None
    assert (confidence[junk] < 0.1).mean() > 0.95
    assert (confidence[~junk] > 0.3).mean() > 0.95  # modes of a pseudo-two-fold share the rest
    capsys.readouterr()
    evaluate.run(str(run), truth=str(good))
    found = json.loads(capsys.readouterr().out)
    assert found["fsc_0.5_shell"] > 12  # of 15: a fifth less data costs less than a shell of 960 good images' map


def test_particles_far_off_centre_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Reference: the simulated shifts, of which a quarter lie beyond the 12 Å that are searched at first; a Gaussian
    # with sigma = 7 Å, so 4 sigma = 28 Å, and the limit of a fifth of the box is 25.6 Å. A particle at its edge is cut.
    data, pixel_size = tmp_path / "far", 4.0
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(data), n=COUNT // 2, box=BOX, pixel_size=pixel_size, snr_db=3.0,
                     defocus_um=(1.0, 2.5), astigmatism_um=0.0, shift_a=7.0, seed=6)  # fmt: skip
    run = run_on(str(data / "particles.star"), tmp_path, guided__shift_radius_a="0", guided__encoder_steps="0",
                 guided__bootstrap_rounds="2", guided__iterations="5")  # fmt: skip
    assert "particles lie up to 2" in capsys.readouterr().err
    found, true = read_poses(str(run / "particles.star")), read_poses(str(data / "truth.star"))
    assert found.shift is not None
    assert true.shift is not None
    off, distance = np.linalg.norm(true.shift, axis=1), np.linalg.norm(found.shift - true.shift, axis=1)
    far = (off > 14) & (off < 22)
    assert far.sum() > 30
    assert np.mean(distance[far] < pixel_size) > 0.9
