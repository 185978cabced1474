"""A mask and a diameter that the user gives: read, checked, resized, and used instead of the automatic mask."""

import math
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from scalecryo.cli import main
from scalecryo.config import TrainConfig, load_config
from scalecryo.data.formats.mrc import read_map, write_map
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError, InputError, MissingInputError
from scalecryo.map.reference import ReferenceSet, reference_transform
from scalecryo.map.solvent import SolventMask
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.mask import soft_sphere
from scalecryo.runs.solvent_mask import load_solvent_mask
from tests.conftest import SimulatedParticles

CPU = torch.device("cpu")
BOX, PIXEL_SIZE = 32, 3.2  # of the simulated store


def white(seed: int) -> torch.Tensor:
    return torch.randn(1, 2, BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def reference_set(solvent: SolventMask | None) -> ReferenceSet:
    # A common ball with noise: the automatic mask needs density to follow.
    maps = 5 * soft_sphere(BOX, 6, 2) + 0.1 * white(0)
    noise = torch.ones(BOX // 2 + 1)
    return ReferenceSet.of_maps(maps, PIXEL_SIZE, noise=noise, radius=10.0, solvent=solvent)


@pytest.mark.parametrize("box", [16, 32, 64])
def test_a_mask_keeps_its_values_in_every_box(box: int) -> None:
    # A Gaussian of sigma 4 of 32 px has nothing past the Nyquist frequency of 16 px: the same in any box.
    def gaussian(n: int) -> torch.Tensor:
        line = (torch.arange(n) - n // 2).double() * (32 / n)
        squared = line[:, None, None] ** 2 + line[:, None] ** 2 + line**2
        return torch.exp(-squared / (2 * 4.0**2)).float()

    found = SolventMask(gaussian(32), 0.0).of_map(box, CPU)
    assert found is not None
    assert torch.allclose(found, gaussian(box), atol=2e-3)  # its tail at the edge of the box, exp(-8), is cut


def test_the_diameter_is_a_soft_sphere() -> None:
    sphere = SolventMask(None, 60.0).sphere(BOX, PIXEL_SIZE, CPU)
    assert sphere is not None
    line = (torch.arange(BOX) - BOX // 2) * PIXEL_SIZE
    distance = (line[:, None, None] ** 2 + line[:, None] ** 2 + line**2).sqrt()
    assert (sphere[distance <= 30] == 1).all()
    assert (sphere[distance >= 30 + 3 * PIXEL_SIZE] == 0).all()
    assert ((sphere > 0) & (sphere < 1)).any()
    assert SolventMask(sphere, 0.0).sphere(BOX, PIXEL_SIZE, CPU) is None


def test_a_mask_replaces_the_automatic_one() -> None:
    given = soft_sphere(BOX, 3, 4)
    with_mask, without = reference_set(SolventMask(given, 0.0)), reference_set(None)
    assert torch.allclose(with_mask.mask[0], given, atol=1e-6)
    pixels = fourier_pixels(BOX)
    # Half 2 at the set's own level: filtered by its FSC, cut to the mask, transformed.
    unmasked = replace(with_mask, reference_mask=torch.ones(BOX, BOX, BOX)).at(BOX, pixels)[0, 2].transform
    assert not torch.allclose(with_mask.at(BOX, pixels)[0, 2].transform, unmasked)
    whole = SolventMask(torch.ones(BOX, BOX, BOX), 0.0)
    everything = reference_set(whole)
    assert torch.allclose(everything.fsc, everything.fsc_masked)  # a mask of ones masks nothing
    flat = replace(everything, fsc_masked=torch.ones_like(everything.fsc_masked))
    # Noise past the last shell is dropped by the filter, so compare a map that has none there.
    smooth = 5 * soft_sphere(BOX, 6, 6)
    flat = replace(flat, maps=smooth.expand(1, 2, -1, -1, -1), reference_mask=given)
    found, expected = flat.at(BOX, pixels)[0, 1].transform, reference_transform(smooth * given, 2.0)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert without.reference_mask is None


def test_a_diameter_cuts_the_automatic_mask_and_the_references() -> None:
    solvent = SolventMask(None, 30.0)
    cut, automatic = reference_set(solvent), reference_set(None)
    sphere = solvent.sphere(BOX, PIXEL_SIZE, CPU)
    assert sphere is not None
    assert torch.equal(cut.mask[0], automatic.mask[0] * sphere)
    assert cut.reference_mask is not None
    assert torch.equal(cut.reference_mask, sphere)


def test_a_checkpoint_keeps_it() -> None:
    made = reference_set(SolventMask(None, 30.0))
    again = ReferenceSet.from_state_dict(made.state_dict(), CPU)
    assert made.reference_mask is not None
    assert again.reference_mask is not None
    assert torch.equal(again.reference_mask, made.reference_mask)
    old = {name: value for name, value in made.state_dict().items() if name != "reference_mask"}
    assert ReferenceSet.from_state_dict(old, CPU).reference_mask is None


def settings(path: Path | str = "", diameter_a: float = 0.0) -> TrainConfig:
    return TrainConfig(mask=str(path), diameter_a=diameter_a)


def test_a_mask_of_another_box_over_the_same_extent_is_read(simulated: SimulatedParticles, tmp_path: Path) -> None:
    store = ParticleStore.open(simulated.store)
    write_map(str(tmp_path / "fine.mrc"), soft_sphere(64, 16, 6).numpy(), PIXEL_SIZE / 2)
    solvent = load_solvent_mask(settings(tmp_path / "fine.mrc"), store)
    assert solvent is not None
    found = solvent.of_map(BOX, CPU)
    assert found is not None
    # Half the box: half the radius and the edge, in px. An edge of three pixels is not quite resolved.
    assert (found - soft_sphere(BOX, 8, 3)).abs().max() < 0.1
    assert load_solvent_mask(settings(), store) is None


@pytest.mark.parametrize(
    ("box", "pixel_size", "values", "says"),
    [
        (32, 1.6, "sphere", "32 px of 1.6 Å, but .* has 32 px of 3.2 Å: both must span the same length"),
        (48, 3.2, "sphere", "48 px of 3.2 Å, but .* has 32 px"),
        (33, 3.2, "sphere", "its box of 33 × 33 × 33 px is no even cube"),
        (32, 3.2, "hot", "values from 0 to 7: a soft mask lies between 0 and 1"),
        (32, 3.2, "nan", "a soft mask lies between 0 and 1"),
        (32, 3.2, "empty", "0 voxels above 0.5"),
    ],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused(
    simulated: SimulatedParticles, tmp_path: Path, box: int, pixel_size: float, values: str, says: str
) -> None:
    mask = soft_sphere(box + box % 2, 6, 3)[:box, :box, :box].numpy()
    mask = mask * {"sphere": 1, "hot": 7, "nan": 1, "empty": 0}[values]
    if values == "nan":
        mask[0, 0, 0] = math.nan
    write_map(str(tmp_path / "mask.mrc"), mask, pixel_size)
    with pytest.raises(InputError, match=says) as caught:
        load_solvent_mask(settings(tmp_path / "mask.mrc"), ParticleStore.open(simulated.store))
    assert "\n" not in str(caught.value)


def test_what_is_no_mask_and_a_diameter_past_the_box_are_refused(
    simulated: SimulatedParticles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ParticleStore.open(simulated.store)
    with pytest.raises(MissingInputError):
        load_solvent_mask(settings(tmp_path / "none.mrc"), store)
    with pytest.raises(ConfigError, match=r"train.diameter_a = 500: the box of .* is 102.4 Å"):
        load_solvent_mask(settings(diameter_a=500.0), store)
    # Refused before the run's folder is made, with the exit code of wrong settings.
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", simulated.store, "--out", str(tmp_path / "run"), "--diameter-a", "500"])
    assert caught.value.code == 2
    assert "train.diameter_a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train.diameter_a = -1.0: must be at least 0"):
        load_config(None, {"train.diameter_a": "-1"})


def test_a_run_ends_with_the_mask_that_it_was_given(simulated: SimulatedParticles, tmp_path: Path) -> None:
    mask = soft_sphere(BOX, 9, 4).numpy()
    with mrcfile.new(tmp_path / "mask.mrc") as file:  # another writer's file
        file.set_data(mask)
        file.voxel_size = PIXEL_SIZE
    main(["train", "--data", simulated.posed_store, "--out", str(tmp_path / "run"), "--pose.source", "known",
          "--train.steps", "3", "--mask", str(tmp_path / "mask.mrc"), "--diameter-a", "80"])  # fmt: skip
    written, _, _ = read_map(str(tmp_path / "run" / "mask.mrc"))
    assert np.allclose(written, mask, atol=1e-6)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert f'mask = "{tmp_path / "mask.mrc"}"' in config
    assert "diameter_a = 80.0" in config
