"""Atomic structures: PDB and mmCIF files in, an electrostatic potential map out.

Atoms are (x, y, z) in Å in the frame of the file; maps are [z, y, x] with the chosen centre at index N//2.
"""

from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from scalecryo.data.formats.unpack import is_packed, unpack
from scalecryo.data.io import urls
from scalecryo.errors import InputError

_UNPACKED_LIMIT = 1 << 30

# Names of water that gemmi's table of residues does not hold (CHARMM, GROMACS, AMBER).
_MORE_WATERS = frozenset({"TIP", "TIP3", "TP3", "TIP4", "SOL", "SPC", "T3P", "T4P"})

# Names that force fields give to protonation states of amino acids; an atom's first letter is its element there.
_MORE_AMINO_ACIDS = frozenset(
    "HSD HSE HSP HID HIE HIP CYX CYM LYN ASH GLH ARN LSN ASPP GLUP".split()  # noqa: SIM905
)

# Interaction of an electron with a potential, h²/(2π m e) in V·Å²: turns scattering factors (Å) into volts
# (Peng 1999, Micron 30:625, eq. 4).
POTENTIAL_PER_SCATTERING = 47.87801


@dataclass(frozen=True)
class Atoms:
    """The atoms of one model, in the order of the file.

    `positions` are (N, 3) float64 (x, y, z) in Å, `elements` N chemical symbols, `b_factor` (N,) isotropic
    displacement factors in Å² as the file gives them, `chains` N names of chains (empty where they are not known).
    """

    positions: NDArray[np.float64]
    elements: tuple[str, ...]
    b_factor: NDArray[np.float64]
    chains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.elements)

    @property
    def masses(self) -> NDArray[np.float64]:
        """Atomic masses in Da, (N,)."""
        table = {symbol: gemmi.Element(symbol).weight for symbol in set(self.elements)}
        return np.array([table[symbol] for symbol in self.elements])

    @property
    def centre_of_mass(self) -> NDArray[np.float64]:
        """Centre of mass (x, y, z) in Å."""
        centre: NDArray[np.float64] = self.masses @ self.positions / self.masses.sum()
        return centre

    def radius_about(self, centre: NDArray[np.floating]) -> float:
        """Largest distance of an atom from `centre`, in Å."""
        return float(np.linalg.norm(self.positions - centre, axis=1).max())


def read_structure(path: str, *, keep_hydrogens: bool = True) -> Atoms:
    """Atoms of a PDB or mmCIF file (plain or gzipped, path or URL).

    Takes the first model and the first alternative location of each atom, polymers and ligands alike, and drops
    waters. Where a PDB file leaves the element column empty (as CHARMM does), the element of an atom in an amino acid
    or nucleotide is the first letter of its name, so that CA is a carbon.

    Raises MissingInputError when there is no such file and InputError when it is not a structure or holds no atoms.
    """
    data = urls.read_bytes(path)
    path = urls.redacted(path)
    if is_packed(data):
        data = unpack(data, path, _UNPACKED_LIMIT)
    try:
        structure, guess = _parse(data.decode("utf-8", errors="replace"))
    except (ValueError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{path} is neither a PDB nor an mmCIF file ({error}): give a structure such as 4ake.pdb or 4ake.cif.gz"
        ) from error
    structure.remove_alternative_conformations()
    found = [
        (atom.pos.tolist(), symbol, atom.b_iso, chain.name)
        for chain, residue in ((chain, residue) for chain in structure[0] for residue in chain)
        if not (residue.is_water() or residue.name in _MORE_WATERS)
        for atom in residue
        if (symbol := _element(residue, atom, guess)) != "H" or keep_hydrogens
    ]
    if not found:
        raise InputError(f"{path} holds no atoms besides water: check that it is the structure you meant")
    positions, elements, b_factor, chains = zip(*found, strict=True)
    if "X" in elements:
        raise InputError(
            f"{path}: atom {elements.index('X') + 1} has no element that could be understood: "
            "fill in the element column (77-78 of a PDB line)"
        )
    return Atoms(np.array(positions, dtype=np.float64), elements, np.array(b_factor, dtype=np.float64), chains)


def _parse(text: str) -> tuple[gemmi.Structure, bool]:
    """The structure in `text`, and whether elements must be guessed from the names of atoms."""
    if "_atom_site." in text:
        return gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block()), False
    atom_lines = [line for line in text.splitlines() if line.startswith(("ATOM  ", "HETATM"))]
    if not atom_lines:
        raise ValueError("no ATOM or HETATM records and no _atom_site table")
    return gemmi.read_pdb_string(text), any(not line[76:78].strip().isalpha() for line in atom_lines)


def _element(residue: gemmi.Residue, atom: gemmi.Atom, guess: bool) -> str:
    """Chemical symbol of an atom; deuterium counts as hydrogen."""
    symbol: str = atom.element.name
    if guess:
        info = gemmi.find_tabulated_residue(residue.name)
        name = atom.name.lstrip("0123456789")
        polymer = info.is_amino_acid() or info.is_nucleic_acid() or residue.name in _MORE_AMINO_ACIDS
        if polymer and not name.startswith("SE"):
            symbol = name[:1]
    return "H" if symbol == "D" else symbol


def potential_map(
    atoms: Atoms, box_size: int, pixel_size: float, centre: NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """Electrostatic potential of isolated atoms, (box_size, box_size, box_size) in volts, `centre` at index N//2.

    Each atom is the five-Gaussian electron scattering factor of International Tables C, table 4.3.2.2, blurred by its
    B factor; there is no solvent. The map is band-limited at its own Nyquist frequency, not point-sampled: the
    potential is sampled on a grid 1.5 times finer, cut in Fourier space and sampled anew, so that nothing is aliased.
    `centre` (x, y, z) in Å is the centre of mass unless given.

    Raises InputError for an odd box, or one in which the structure does not fit at every rotation.
    """
    if box_size % 2 or box_size < 4:
        raise InputError(f"box size {box_size} cannot be used: choose an even number of pixels, e.g. 128")
    centre = atoms.centre_of_mass if centre is None else centre
    needed = 2 * atoms.radius_about(centre)
    if needed > box_size * pixel_size:
        raise InputError(
            f"the structure needs {needed:.0f} Å and a box of {box_size} px at {pixel_size:g} Å/px has "
            f"{box_size * pixel_size:.0f} Å: use a box of at least {2 * int(np.ceil(needed / pixel_size / 2))} px, "
            "or larger pixels"
        )
    calculator = _density_calculator(atoms, box_size, pixel_size, centre)
    fine = np.fft.rfftn(calculator.grid.array.transpose(2, 1, 0)).astype(np.complex64, copy=False)
    transform = _crop(fine, box_size) * (box_size / calculator.grid.nu) ** 3
    ky = np.fft.fftfreq(box_size, pixel_size)
    kx = np.fft.rfftfreq(box_size, pixel_size)
    squared = ky[:, None, None] ** 2 + ky[None, :, None] ** 2 + kx[None, None, :] ** 2
    # The calculator widens every atom by `blur` so that the fine grid can hold it; this takes that out again.
    transform *= np.exp(calculator.blur * squared / 4).astype(np.float32)
    volume = np.fft.irfftn(transform, s=(box_size,) * 3, axes=(0, 1, 2))
    return (POTENTIAL_PER_SCATTERING * volume).astype(np.float32)


def _density_calculator(
    atoms: Atoms, box_size: int, pixel_size: float, centre: NDArray[np.floating]
) -> gemmi.DensityCalculatorE:
    """gemmi's calculator with the scattering density of the atoms on a grid 1.5 times finer than the box."""
    model = gemmi.Model(1)
    residue = gemmi.Residue()
    residue.name = "UNK"
    shifted = atoms.positions - centre + (box_size // 2) * pixel_size
    for position, symbol, b_factor in zip(shifted, atoms.elements, atoms.b_factor, strict=True):
        atom = gemmi.Atom()
        atom.pos = gemmi.Position(*position)
        atom.element = gemmi.Element(symbol)
        atom.b_iso = max(float(b_factor), 0.0)
        residue.add_atom(atom)
    chain = gemmi.Chain("A")
    chain.add_residue(residue)
    model.add_chain(chain)
    calculator = gemmi.DensityCalculatorE()
    calculator.d_min = 2 * pixel_size
    calculator.rate = 1.5
    calculator.cutoff = 1e-6
    length = box_size * pixel_size
    calculator.grid.unit_cell.set(length, length, length, 90, 90, 90)
    calculator.grid.spacegroup = gemmi.find_spacegroup_by_name("P 1")
    calculator.set_refmac_compatible_blur(model)
    calculator.put_model_density_on_grid(model)
    return calculator


def _crop(transform: NDArray[np.complex64], box_size: int) -> NDArray[np.complex64]:
    """Frequencies below Nyquist of a box of `box_size` from the transform of a larger one; Nyquist itself is zero."""
    half = box_size // 2
    rows = np.r_[0:half, half + 1 : box_size]
    source = np.r_[0:half, transform.shape[0] - half + 1 : transform.shape[0]]
    small = np.zeros((box_size, box_size, half + 1), np.complex64)
    small[np.ix_(rows, rows, np.arange(half))] = transform[np.ix_(source, source, np.arange(half))]
    return small
