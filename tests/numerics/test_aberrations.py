"""Beam tilt, Zernike phases and magnification: closed forms, and RELION 3.1.3's own reconstructions and projections."""

import math
import shutil
import subprocess
from importlib.resources import as_file, files
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from torch import Tensor

from scalecryo.commands import convert, simulate, train
from scalecryo.config import config_from_dict
from scalecryo.data.formats.mrc import read_map, write_map
from scalecryo.data.formats.relion import read_particles, read_poses, write_particles
from scalecryo.data.particles import ABERRATION_COLUMNS, ParticleTable
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import InputError
from scalecryo.physics.aberrations import (
    ImageAberrations,
    corrected_images,
    corrected_shift,
    recorded_shift,
    resampled,
    zernike_orders,
    zernike_phase,
)
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction
from scalecryo.physics.fsc import fsc
from scalecryo.physics.rotation import euler_to_rotation
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_source import RunContext, stream_columns

BOX, PIXEL_SIZE, COUNT = 64, 2.0, 300
VOLTAGE, CS, CONTRAST = 300.0, 2.7, 0.1
MATRIX = torch.tensor([[1.03, 0.02], [-0.01, 0.98]])
TILT = (4.0, -3.0)  # mrad
ODD = [3.0, -2.0, 120.0, 60.0, -50.0, 160.0]  # the terms (3, ±1) at places 3 and 4
EVEN = [0.1, 8.0, -12.0, 16.0, 120.0, -20.0, 20.0, 15.0, -130.0]
relion = pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")


def wavelength() -> float:
    """Å, of electrons at 300 kV (CODATA: 0.0196875)."""
    return 0.0196875


def polynomials(x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Zernike polynomials in x and y, written out: the odd ones up to n = 3, the even ones up to n = 4."""
    r2 = x * x + y * y
    odd = [y, x, 3 * x * x * y - y**3, (3 * r2 - 2) * y, (3 * r2 - 2) * x, x**3 - 3 * x * y * y]
    two = [2 * x * y, 2 * r2 - 1, x * x - y * y]
    outer = 4 * r2 - 3
    four = [4 * x * y * (x * x - y * y), outer * two[0], 6 * r2 * r2 - 6 * r2 + 1, outer * two[2],
            x**4 - 6 * x * x * y * y + y**4]  # fmt: skip
    return odd, [torch.ones_like(x), *two, *four]


def test_zernike_polynomials_as_written_out() -> None:
    x, y = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    for parity, written in zip((True, False), polynomials(x, y), strict=True):
        for place, expected in enumerate(written):
            one = torch.zeros(1, len(written), dtype=torch.float64)
            one[0, place] = 1.0
            assert torch.allclose(zernike_phase(one, x, y, odd=parity)[0], expected, atol=1e-12)
    assert zernike_orders(True, 12)[6:] == ((5, -5), (5, -3), (5, -1), (5, 1), (5, 3), (5, 5))
    # R_6^2 = 15 r^6 - 20 r^4 + 6 r^2; (6, 2) comes after 1 + 3 + 5 terms and (6, -6) to (6, 0).
    one = torch.zeros(1, 16, dtype=torch.float64)
    one[0, 13] = 1.0
    r2 = x * x + y * y
    expected = (15 * r2**3 - 20 * r2**2 + 6 * r2) * (x * x - y * y) / r2
    assert torch.allclose(zernike_phase(one, x, y, odd=False)[0], expected, atol=1e-12)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """A lopsided blob of sigmas 2.5 and 4 px, away from the centre."""
    return torch.exp(-((x - 3) ** 2) / (2 * 2.5**2) - ((y + 5 + 0.4 * x) ** 2) / (2 * 4.0**2))


def test_resampling_a_gaussian() -> None:
    # det(M) f(M^T x) exactly; the blob's transform at Nyquist is exp(-(π 2.5)² / 2), nothing.
    line = torch.arange(BOX).double() - BOX // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    matrix = MATRIX.double()
    there = matrix.T @ torch.stack([x.flatten(), y.flatten()])
    expected = matrix.det() * gaussian(there[0], there[1]).view(BOX, BOX)
    assert (resampled(gaussian(x, y).float()[None], MATRIX)[0] - expected).abs().max() < 1e-5
    assert (resampled(gaussian(x, y).float()[None], torch.eye(2))[0] - gaussian(x, y)).abs().max() < 1e-5


def test_images_of_several_groups_are_corrected_by_their_own() -> None:
    images = torch.randn(5, 32, 32, generator=torch.Generator().manual_seed(0))
    odd, matrix = torch.zeros(5, 12), torch.eye(2).repeat(5, 1, 1)
    odd[1, 5] = odd[3, 5] = 50.0
    matrix[2:4] = MATRIX
    found = corrected_images(images, ImageAberrations(odd, matrix), PIXEL_SIZE)
    for row in range(5):
        alone = slice(row, row + 1)
        expected = corrected_images(images[alone], ImageAberrations(odd[alone], matrix[alone]), PIXEL_SIZE)
        assert torch.allclose(found[alone], expected, atol=1e-5)
    assert torch.equal(found[0], images[0])
    assert not torch.allclose(found[1], images[1])


class Recorded:
    """Noise-free images with aberrations, by the closed form: exp(i odd(q)) CTF(q) V(q) at q = M k."""

    def __init__(self, folder: Path) -> None:
        with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
            simulate.run(
                str(structure),
                str(folder / "truth"),
                n=2,
                box=BOX,
                pixel_size=PIXEL_SIZE,
                snr_db=None,
                defocus_um=None,
                astigmatism_um=0.0,
                shift_a=0.0,
                seed=0,
            )
        volume, _, _ = read_map(str(folder / "truth" / "truth.mrc"))
        self.folder, self.volume = folder, torch.from_numpy(volume)
        self.pixels = fourier_pixels(BOX)
        generator = np.random.default_rng(0)
        tilt = np.degrees(np.arccos(generator.uniform(-1, 1, COUNT)))
        turn = generator.uniform(-180, 180, (2, COUNT))
        self.angles = np.stack([turn[0], tilt, turn[1]], 1).round(4)
        self.defocus = generator.uniform(1500, 3500, COUNT).round(1)  # Å: little signal leaves the box

    def parameters(self, even: list[float] | None = None) -> CtfParameters:
        values = [self.defocus, self.defocus, 0.0, VOLTAGE, CS, CONTRAST, 0.0]
        columns = (torch.as_tensor(value).float().expand(COUNT) for value in values)
        return CtfParameters(*columns, None if even is None else torch.tensor(even).expand(COUNT, -1))

    def transforms(self, matrix: Tensor, odd: list[float], even: list[float], tilt: tuple[float, float]) -> Tensor:
        """Transforms, packed; the CTF by its formula, not by the package."""
        padded = rfft3_centred(self.volume * gridding_correction(BOX, 2.0), 2 * BOX)
        kx, ky = matrix @ torch.stack([self.pixels.kx, self.pixels.ky])
        in_space = torch.eye(3)
        in_space[:2, :2] = matrix
        rotation = euler_to_rotation(torch.from_numpy(self.angles).float()) @ in_space
        slices = extract_slices(padded, rotation, self.pixels.kx, self.pixels.ky, 2.0)
        x, y = kx / (BOX * PIXEL_SIZE), ky / (BOX * PIXEL_SIZE)
        s2, length = x * x + y * y, wavelength()
        odd_terms, even_terms = polynomials(x, y)
        phase = sum(c * term for c, term in zip(odd, odd_terms, strict=True))
        phase = phase - 2 * math.pi * 1e7 * CS * length**2 * s2 * (x * tilt[0] + y * tilt[1]) * 1e-3
        gamma = sum(c * term for c, term in zip(even, even_terms, strict=True))
        defocus = torch.from_numpy(self.defocus).float()[:, None]
        chi = math.pi * length * defocus * s2 - math.pi / 2 * 1e7 * CS * length**3 * s2 * s2
        ctf = torch.sin(chi + math.asin(CONTRAST) - gamma)
        return slices * ctf * torch.polar(torch.ones_like(phase), phase)

    def table(self, name: str, optics: dict[str, str], transforms: Tensor | None = None, origin: float = 0.0) -> Path:
        """A STAR file of these views; where transforms are given, with a stack of them."""
        columns = {"rlnOpticsGroup": "1", "rlnOpticsGroupName": "g", "rlnVoltage": VOLTAGE,
                   "rlnSphericalAberration": CS, "rlnAmplitudeContrast": CONTRAST, "rlnImagePixelSize": PIXEL_SIZE,
                   "rlnImageSize": BOX, "rlnImageDimensionality": 2, **optics}  # fmt: skip
        rows = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnDefocusU",
                "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnOpticsGroup", "rlnImageName"]  # fmt: skip
        text = "# version 30001\n\ndata_optics\n\nloop_\n" + "".join(f"_{column}\n" for column in columns)
        text += " ".join(map(str, columns.values())) + "\n\n# version 30001\n\ndata_particles\n\nloop_\n"
        text += "".join(f"_{column}\n" for column in rows)
        for number, (angles, defocus) in enumerate(zip(self.angles.tolist(), self.defocus.tolist(), strict=True), 1):
            values = (*angles, origin, -origin, defocus, defocus, 0, 0, 1, f"{number:06d}@{name}.mrcs")
            text += " ".join(map(str, values)) + "\n"
        (self.folder / f"{name}.star").write_text(text + "\n")
        if transforms is not None:
            images = irfft2_centred(self.pixels.unpack(transforms), BOX)
            with mrcfile.new(self.folder / f"{name}.mrcs", overwrite=True) as file:
                file.set_data(images.numpy())
                file.voxel_size = PIXEL_SIZE
        return self.folder / f"{name}.star"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("aberrations"))


def listed(values: list[float]) -> str:
    return "[" + ",".join(map(str, values)) + "]"


MAGNIFICATION = {f"rlnMagMat{i}{j}": str(round(float(MATRIX[i, j]), 4)) for i in (0, 1) for j in (0, 1)}
OPTICS = {"rlnBeamTiltX": str(TILT[0]), "rlnBeamTiltY": str(TILT[1]), "rlnOddZernike": listed(ODD),
          "rlnEvenZernike": listed(EVEN), **MAGNIFICATION}  # fmt: skip
# Of a table with a tilt RELION takes the terms (3, ±1) from the tilt alone.
ODD_BESIDE_TILT = [*ODD[:3], 0.0, 0.0, ODD[5]]


def run(*command: object, folder: Path) -> None:
    subprocess.run([str(part) for part in command], cwd=folder, check=True, capture_output=True)


@relion
@pytest.mark.parametrize(
    ("optics", "matrix", "odd", "even", "tilt"),
    [
        ({"rlnBeamTiltX": "4.0", "rlnBeamTiltY": "-3.0"}, torch.eye(2), [0.0] * 6, [0.0] * 9, TILT),
        ({"rlnOddZernike": listed(ODD)}, torch.eye(2), ODD, [0.0] * 9, (0.0, 0.0)),
        (OPTICS, MATRIX, ODD_BESIDE_TILT, EVEN, TILT),
    ],
    ids=["tilt", "odd", "all"],
)
def test_relion_reconstructs_what_the_closed_form_makes(
    recorded: Recorded, optics: dict[str, str], matrix: Tensor, odd: list[float], even: list[float],
    tilt: tuple[float, float],
) -> None:  # fmt: skip
    """The forward model above is RELION's: with its table RELION finds the map; with any other, not."""

    def agreement(table: dict[str, str]) -> float:
        recorded.table("relion", table, recorded.transforms(matrix, odd, even, tilt))
        run("relion_reconstruct", "--i", "relion.star", "--o", "found.mrc", "--ctf", "--angpix", PIXEL_SIZE,
            folder=recorded.folder)  # fmt: skip
        found, _, _ = read_map(str(recorded.folder / "found.mrc"))
        return float(fsc(torch.from_numpy(found), recorded.volume)[18:28].mean())

    assert agreement(optics) > 0.98  # 300 views and nearest to trilinear gridding; 0.997 to shell 30 of 32 with 400
    assert agreement({}) < 0.9


@relion
def test_even_phase_is_that_of_relion_project(recorded: Recorded) -> None:
    recorded.table("even", {"rlnEvenZernike": listed(EVEN)})
    recorded.table("flat", {})
    write_map(str(recorded.folder / "map.mrc"), recorded.volume.numpy(), PIXEL_SIZE)
    packed = []
    for name, ctf in (("even", ["--ctf"]), ("flat", [])):
        run("relion_project", "--i", "map.mrc", "--ang", f"{name}.star", "--o", f"p_{name}", "--angpix", PIXEL_SIZE,
            *ctf, folder=recorded.folder)  # fmt: skip
        with mrcfile.open(recorded.folder / f"p_{name}.mrcs") as file:
            packed.append(recorded.pixels.pack(rfft2_centred(torch.from_numpy(file.data.astype(np.float32)))))
    pixels = recorded.pixels
    ctf_values = contrast_transfer(recorded.parameters(EVEN), pixels.kx, pixels.ky, BOX, PIXEL_SIZE)
    difference = (packed[1] * ctf_values - packed[0]).abs().square().sum()
    # Both in single precision, through images: 1e-4 of the amplitude without an even phase as well.
    assert difference.sqrt() < 1e-3 * packed[0].abs().square().sum().sqrt()


def test_a_store_gives_images_with_aberrations_undone(recorded: Recorded, tmp_path: Path) -> None:
    transforms = recorded.transforms(MATRIX, ODD_BESIDE_TILT, EVEN, TILT)
    source = recorded.table("all", OPTICS, transforms)
    convert.run(str(source), str(tmp_path / "store"), data_dir=None, box=None, dtype="float32", workers=1,
                overwrite=False, invert=False, uninvert=True)  # fmt: skip
    store = ParticleStore.open(str(tmp_path / "store"))
    assert store.has_aberrations
    config = config_from_dict({"run": {"data": store.url, "out": str(tmp_path / "run")}})
    context = RunContext.of(config, store, RunFolder(str(tmp_path / "run")), World(), torch.device("cpu"))
    assert set(ABERRATION_COLUMNS) <= set(stream_columns(store))
    batch = next(iter(context_batches(context)))
    images = context.images(batch, recorded.pixels)
    assert images.ctf is not None
    order = images.rows
    padded = rfft3_centred(recorded.volume * gridding_correction(BOX, 2.0), 2 * BOX)
    rotation = euler_to_rotation(torch.from_numpy(recorded.angles[order]).float())
    expected = images.ctf * extract_slices(padded, rotation, recorded.pixels.kx, recorded.pixels.ky, 2.0)
    # Past shell 28 of 32 the recorded images had no frequencies to give (M shrinks them by up to 3 %).
    near = (recorded.pixels.radius > 2) & (recorded.pixels.radius < 28)
    found, expected = images.transforms[:, near], expected[:, near]
    scale = (expected.conj() * found).real.sum() / expected.abs().square().sum()  # of the store's normalisation
    error = (found / scale - expected).abs().square().sum() / expected.abs().square().sum()
    # The store's images, as they are, differ by a third of their power.
    plain = recorded.pixels.pack(rfft2_centred(batch.images))[:, near] / scale
    assert (plain - expected).abs().square().sum() / expected.abs().square().sum() > 0.3
    # One specimen sliced at two places, trilinearly with padding 2: 1 % of the amplitude at low, 4 % at high frequency;
    # phases and CTF alone agree to 1e-4.
    assert error.sqrt() < 0.03


def context_batches(context: RunContext):
    from scalecryo.data.streaming.stream import sequential

    return sequential(context.store, BOX, rank=0, world_size=1, batch_size=64, columns=stream_columns(context.store),
                      rows_limit=None, device=torch.device("cpu"))  # fmt: skip


def table_of(recorded: Recorded, optics: dict[str, str]) -> ParticleTable:
    return read_particles(str(recorded.table("t", optics)))


def test_tables_without_aberrations_have_no_columns(recorded: Recorded) -> None:
    idle = {"rlnBeamTiltX": "0", "rlnBeamTiltY": "0.0", "rlnOddZernike": "[0,0,0]", "rlnMagMat00": "1",
            "rlnMagMat01": "0", "rlnMagMat10": "0", "rlnMagMat11": "1"}  # fmt: skip
    assert not set(ABERRATION_COLUMNS) & set(table_of(recorded, idle).columns)
    assert set(ABERRATION_COLUMNS) <= set(table_of(recorded, {"rlnEvenZernike": "[1,2]"}).columns)


def test_particles_with_aberrations_are_not_appended_to_a_store_without(recorded: Recorded, tmp_path: Path) -> None:
    transforms = recorded.transforms(torch.eye(2), [0.0] * 6, [0.0] * 9, (0.0, 0.0))
    options = {"data_dir": None, "box": None, "dtype": "float32", "workers": 1, "overwrite": False, "invert": False,
               "uninvert": True}  # fmt: skip
    convert.run(str(recorded.table("plain", {}, transforms)), str(tmp_path / "store"), **options)
    assert not ParticleStore.open(str(tmp_path / "store")).has_aberrations
    with pytest.raises(InputError, match="has aberrations of the optics"):
        convert.run(str(recorded.table("tilted", {"rlnBeamTiltX": "1", "rlnBeamTiltY": "0"}, transforms)),
                    str(tmp_path / "store"), add=True, **options)  # fmt: skip


def test_a_table_written_anew_keeps_its_aberrations(recorded: Recorded, tmp_path: Path) -> None:
    table = table_of(recorded, OPTICS)
    write_particles(str(tmp_path / "out.star"), table.image_names(), table, with_poses=True, box_size=BOX)
    again = read_particles(str(tmp_path / "out.star"))
    for name in ABERRATION_COLUMNS:  # nine digits hold single precision
        assert np.array_equal(again.columns[name], table.columns[name]), name


def test_beam_tilt_as_zernike_terms(recorded: Recorded) -> None:
    columns = table_of(recorded, {"rlnBeamTiltX": "1.5", "rlnBeamTiltY": "-1.0"}).columns
    x, y = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) * 0.5 - 0.25
    found = zernike_phase(torch.from_numpy(columns["odd_phase"][:1]), x, y, odd=True)[0]
    expected = -2 * math.pi * 1e7 * CS * wavelength() ** 2 * (x * x + y * y) * (x * 1.5e-3 - y * 1e-3)
    assert torch.allclose(found, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("optics", "says"),
    [
        ({"rlnBeamTiltX": "1"}, "rlnBeamTiltY is missing"),
        ({"rlnMagMat00": "1.01"}, "rlnMagMat01, rlnMagMat10, rlnMagMat11 is missing"),
        ({"rlnOddZernike": "[1,x]"}, "rlnOddZernike is .*, not a list of numbers"),
        ({"rlnOddZernike": listed([0.0] * 12 + [1.0])}, "has 13 coefficients, at most 12 are known"),
        (MAGNIFICATION | {"rlnMagMat00": "2"}, "the magnification matrix of row 1 is"),
    ],
)
def test_what_cannot_be_applied_is_refused(recorded: Recorded, optics: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        table_of(recorded, optics)
    assert "\n" not in str(caught.value)


def test_shifts_of_recorded_and_of_corrected_images() -> None:
    """A blob at M^T t of the recorded image is at t of the corrected one: by the centres of mass."""
    line = torch.arange(BOX).float() - BOX // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.tensor([6.0, -9.0])
    image = torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * 3.0**2))
    moved = resampled(image[None], MATRIX)[0]
    centre = torch.stack([(moved * x).sum(), (moved * y).sum()]) / moved.sum()
    expected = corrected_shift(at[None], MATRIX[None])[0]
    assert centre.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert recorded_shift(expected[None], MATRIX[None])[0].tolist() == pytest.approx(at.tolist(), abs=1e-5)
    assert (expected - at).norm() > 0.1


def test_a_run_reads_and_writes_origins_of_the_recorded_images(recorded: Recorded, tmp_path: Path) -> None:
    """Refined from its own poses, the table keeps its origins, although they are others in the corrected images."""
    origin = 7.0  # Å, x; -7 y
    kx, ky, step = recorded.pixels.kx, recorded.pixels.ky, 2 * math.pi / (BOX * PIXEL_SIZE)
    ramp = (kx - ky) * origin * step  # RELION's origin is minus where the content sits
    moved = recorded.transforms(MATRIX, [0.0] * 6, [0.0] * 9, (0.0, 0.0)) * torch.polar(torch.ones_like(ramp), ramp)
    noise = torch.randn(COUNT, BOX, BOX, generator=torch.Generator().manual_seed(0))
    level = 0.5 * float(irfft2_centred(recorded.pixels.unpack(moved), BOX).std())
    moved = moved + recorded.pixels.pack(rfft2_centred(noise)) * level
    source = recorded.table("moved", MAGNIFICATION, moved, origin=origin)
    convert.run(str(source), str(tmp_path / "store"), data_dir=None, box=None, dtype="float32", workers=1,
                overwrite=False, invert=False, uninvert=True)  # fmt: skip
    settings = {"guided.start": "poses", "guided.iterations": "1", "guided.encoder_steps": "0"}
    train.run(None, data=str(tmp_path / "store"), out=str(tmp_path / "run"), workers="0", device="cpu", resume=False,
              overrides=settings)  # fmt: skip
    found = read_poses(str(tmp_path / "run" / "particles.star"))
    assert found.shift is not None
    # M^T changes the shift by (0.28, 0.28) Å, which would be seen; the median of 300 refined shifts is far better.
    assert np.median(found.shift - np.array([-origin, origin]), axis=0) == pytest.approx([0, 0], abs=0.08)
