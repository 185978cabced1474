"""cryoSPARC's .cs tables: NumPy structured arrays in .npy format, one row a particle.

`alignments3D/pose` is the rotation vector, in radians, of our R (checked against cryoDRGN's conversion of a real
refinement: A = Rᵀ). `alignments3D/shift` is in pixels with RELION's sign, minus ours. Angles are in radians, lengths in
Å, `blob/idx` counts from 0, `blob/sign` is −1 where the images are protein-dark.
"""

import hashlib
import io
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
import roma
import torch
from numpy.typing import NDArray

from scalecryo.data import files
from scalecryo.data.particles import CTF_COLUMNS, Columns, ParticleTable
from scalecryo.errors import InputError
from scalecryo.physics.rotation import rotation_from_vector

#: Our column and cryoSPARC's field, where only the unit differs; the factor turns cryoSPARC's into ours.
_CTF: Mapping[str, tuple[str, float]] = {
    "defocus_u": ("ctf/df1_A", 1.0),
    "defocus_v": ("ctf/df2_A", 1.0),
    "astigmatism_angle": ("ctf/df_angle_rad", 180 / np.pi),
    "voltage": ("ctf/accel_kv", 1.0),
    "spherical_aberration": ("ctf/cs_mm", 1.0),
    "amplitude_contrast": ("ctf/amp_contrast", 1.0),
    "phase_shift": ("ctf/phase_shift_rad", 180 / np.pi),
}


def read_particles(url: str) -> ParticleTable:
    """The particle table of a .cs file; poses and CTF where it has them.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a .cs file, a field is missing, or the pixel sizes differ.
    """
    shown = files.shown(url)
    data = files.read_bytes(url)
    try:
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{shown}: not a cryoSPARC table ({str(error).splitlines()[0]})") from error
    names = rows.dtype.names or ()
    missing = [name for name in ("blob/path", "blob/idx", "blob/psize_A") if name not in names]
    if missing:
        raise InputError(f"{shown}: field {missing[0]} is missing; give a .cs file of particles with their blob")
    pixel_size = np.asarray(rows["blob/psize_A"], dtype=np.float64)
    if len(rows) and np.ptp(pixel_size) > 1e-4 * pixel_size.max():
        raise InputError(
            f"{shown}: pixel sizes from {pixel_size.min():g} to {pixel_size.max():g} Å; rescale the particles to one"
        )
    # A path that starts with > is relative to the table's own folder.
    stacks, stack = np.unique(rows["blob/path"], return_inverse=True)
    group, split = "ctf/exp_group_id", "alignments3D/split"
    columns: Columns = {
        "stack": stack,
        "stack_index": rows["blob/idx"].astype(np.int64),
        "source_row": np.arange(len(rows)),
        "optics_group": rows[group] + 1 if group in names else np.ones(len(rows)),
        "half": rows[split] + 1 if split in names else np.zeros(len(rows)),
    }
    if all(field in names for field, _ in _CTF.values()):
        columns |= {ours: rows[field] * factor for ours, (field, factor) in _CTF.items()}
    if "alignments3D/pose" in names and "alignments3D/shift" in names:
        own_pixel_size = rows["alignments3D/psize_A"] if "alignments3D/psize_A" in names else pixel_size
        vector = torch.from_numpy(rows["alignments3D/pose"].astype(np.float64))
        columns["rotation"] = rotation_from_vector(vector).numpy()
        columns["shift"] = -rows["alignments3D/shift"].astype(np.float64) * own_pixel_size[:, None]
    decoded = tuple(path.decode().removeprefix(">") for path in stacks.tolist())
    return ParticleTable(float(pixel_size[0]) if len(rows) else 0.0, decoded, columns)


def write_particles(
    url: str, table: ParticleTable, box_size: int, sign: int = 1, confidence: NDArray[np.floating] | None = None
) -> None:
    """Write a .cs file of particles with blob, CTF (when the table has it) and 3D alignment.

    Args:
        url: where to.
        table: particles with poses.
        box_size: of the images, px.
        sign: −1 where the stacks that the table names are protein-dark.
        confidence: (N,) 0 to 1, written as alignments3D/class_posterior.
    """
    columns, count = table.columns, len(table)
    stacks = np.array([stack.encode() for stack in table.stacks] or [b""], dtype=np.bytes_)
    paths = stacks[columns["stack"]]
    fields: dict[str, NDArray] = {
        "uid": _identifiers(table),
        "blob/path": paths,
        "blob/idx": columns["stack_index"].astype(np.uint32),
        "blob/shape": np.full((count, 2), box_size, np.uint32),
        "blob/psize_A": _constant(count, table.pixel_size),
        "blob/sign": _constant(count, float(sign)),
    }
    if table.has_ctf:
        fields |= {"ctf/type": np.full(count, b"imported")}
        fields |= {"ctf/exp_group_id": (columns["optics_group"] - 1).astype(np.uint32)}
        fields |= {_CTF[name][0]: (columns[name] / _CTF[name][1]).astype(np.float32) for name in CTF_COLUMNS}
        fields |= {"ctf/scale": _constant(count, 1.0), "ctf/scale_const": _constant(count, 0.0)}
        zeros = {"shift_A": 2, "tilt_A": 2, "trefoil_A": 2, "tetra_A": 4, "anisomag": 4}
        fields |= {f"ctf/{name}": np.zeros((count, size), np.float32) for name, size in zeros.items()}
        fields |= {"ctf/bfactor": _constant(count, 0.0)}
    rotation = torch.from_numpy(columns["rotation"].astype(np.float64))
    fields |= {
        "alignments3D/split": np.maximum(columns["half"] - 1, 0).astype(np.uint32),
        "alignments3D/shift": (-columns["shift"] / table.pixel_size).astype(np.float32),
        "alignments3D/pose": roma.rotmat_to_rotvec(rotation).numpy().astype(np.float32),
        "alignments3D/psize_A": _constant(count, table.pixel_size),
        "alignments3D/alpha": _constant(count, 1.0),
        "alignments3D/class": np.zeros(count, np.uint32),
        "alignments3D/class_posterior": (
            _constant(count, 1.0) if confidence is None else np.asarray(confidence, dtype=np.float32)
        ),
        "alignments3D/class_ess": _constant(count, 1.0),
    }
    rows = np.zeros(count, [(name, values.dtype, values.shape[1:]) for name, values in fields.items()])
    for name, values in fields.items():
        rows[name] = values
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    files.write_bytes_atomic(url, buffer.getbuffer())


def write_group(url: str, table_name: str, table: ParticleTable) -> None:
    """Write the .csg file by which cryoSPARC's Import Result Group job takes in a .cs file of the same folder."""
    lines = [
        f"created: {datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
        "group:",
        "  description: Particles with poses by scalecryo",
        "  name: particles",
        "  title: Particles",
        "  type: particle",
        "results:",
    ]
    for kind in ("blob", "ctf", "alignments3D") if table.has_ctf else ("blob", "alignments3D"):
        lines += [f"  {kind}:", f"    metafile: '>{table_name}'"]
        lines += [f"    num_items: {len(table)}", f"    type: particle.{kind}"]
    files.write_bytes_atomic(url, "\n".join([*lines, "version: v4.4.1", ""]).encode())


def _identifiers(table: ParticleTable) -> NDArray[np.uint64]:
    """A 64-bit number for every particle, from the name of its image, so that it is the same in every export."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in table.image_names())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _constant(count: int, value: float) -> NDArray[np.float32]:
    return np.full(count, value, np.float32)
