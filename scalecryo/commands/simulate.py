"""`scalecryo simulate`: particles of a structure or a map, with the truth beside them."""

import math

import torch

from scalecryo.commands.console import Progress, say
from scalecryo.data.formats.mrc import StackWriter, read_map, write_map
from scalecryo.data.formats.relion import write_particles
from scalecryo.data.formats.structure import potential_map, read_structure
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.data.simulation import Imaging, Projector, draw_particles, fit_map, noise_sigma
from scalecryo.errors import InputError, OutputExistsError

_CHUNK = 64
_SAMPLE = 512
_MAPS = (".mrc", ".map", ".ccp4")
_OUTPUTS = ("particles.mrcs", "particles.star", "truth.star", "truth.mrc")


def run(
    structure: str,
    out_dir: str,
    *,
    n: int,
    box: int,
    pixel_size: float,
    snr_db: float | None,
    defocus_um: tuple[float, float] | None,
    astigmatism_um: float,
    shift_a: float,
    seed: int,
) -> None:
    """Write particles.mrcs, particles.star (no poses), truth.star (the same rows with poses) and truth.mrc.

    The noise is white, of one variance for the whole stack: the variance of the pixels of the first 512 noise-free
    images over 10^(snr_db / 10). truth.mrc has its ORIGIN set so that it lies on the structure's own coordinates.
    """
    existing = [name for name in _OUTPUTS if urls.exists(urls.join(out_dir, name))]
    if existing:
        raise OutputExistsError(
            f"{urls.redacted(out_dir)} already holds {existing[0]}: remove it, or name another folder"
        )
    if snr_db is not None and not math.isfinite(snr_db):
        raise InputError(f"a signal-to-noise ratio of {snr_db} dB means nothing: give a number, or leave it out")
    generator = torch.Generator().manual_seed(seed)
    table = draw_particles(n, Imaging(pixel_size, defocus_um, astigmatism_um, shift_a), "particles.mrcs", generator)
    volume, origin = _density(structure, box, pixel_size)
    names = table.image_names()
    try:
        _write_images(urls.join(out_dir, "particles.mrcs"), Projector(volume, pixel_size), table, snr_db, generator)
        write_map(urls.join(out_dir, "truth.mrc"), volume.numpy(), pixel_size, origin)
        write_particles(urls.join(out_dir, "truth.star"), names, table, with_poses=True, box_size=box)
        write_particles(urls.join(out_dir, "particles.star"), names, table, with_poses=False, box_size=box)
    except BaseException:
        # None of them was there before: what is left now would only stand in the way of the next try.
        for name in _OUTPUTS:
            urls.remove_tree(urls.join(out_dir, name))
        raise
    noise = "without noise" if snr_db is None else f"{snr_db:g} dB"
    say(f"{urls.redacted(out_dir)}: {n:,} particles, {box} px, {pixel_size:g} Å/px, {noise}")


def _write_images(
    path: str, projector: Projector, table: ParticleTable, snr_db: float | None, generator: torch.Generator
) -> None:
    """Make and write the stack chunk by chunk, telling how far it is."""
    count, sigma = len(table), 0.0
    if snr_db is not None:
        chunks = range(0, min(count, _SAMPLE), _CHUNK)
        sigma = noise_sigma(torch.cat([projector.images(table, slice(i, i + _CHUNK)) for i in chunks]), snr_db)
    progress = Progress("made")
    progress(0, count)
    with StackWriter(path, count, projector.box_size, projector.pixel_size) as stack:
        for first in range(0, count, _CHUNK):
            images = projector.images(table, slice(first, first + _CHUNK))
            if snr_db is not None:
                images = images + sigma * torch.randn(images.shape, generator=generator)
            stack.append(images.numpy())
            progress(first + len(images), count)


def _density(structure: str, box: int, pixel_size: float) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The map to project, its centre at index N//2, and the position of its first voxel in Å (x, y, z)."""
    if structure.lower().removesuffix(".gz").removesuffix(".bz2").endswith(_MAPS):
        volume, own_pixel_size, _ = read_map(structure)
        if own_pixel_size <= 0 or len(set(volume.shape)) != 1:
            raise InputError(
                f"{urls.redacted(structure)}: {volume.shape} voxels of {own_pixel_size:g} Å: "
                "a cubic map with a pixel size in its header is needed"
            )
        return fit_map(torch.from_numpy(volume), own_pixel_size, box, pixel_size), (0.0, 0.0, 0.0)
    atoms = read_structure(structure)
    x, y, z = (atoms.centre_of_mass - (box // 2) * pixel_size).tolist()
    return torch.from_numpy(potential_map(atoms, box, pixel_size)), (x, y, z)
