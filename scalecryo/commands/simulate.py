"""`scalecryo simulate`: particles of a structure or a map, with the truth beside them."""

from collections.abc import Sequence

import torch

from scalecryo.commands.arguments import SIMULATED, check_simulate, truth_maps
from scalecryo.commands.console import Progress, say
from scalecryo.data.formats.mrc import StackWriter, write_map
from scalecryo.data.formats.relion import write_particles
from scalecryo.data.io import urls
from scalecryo.data.simulation.density import densities, diameter
from scalecryo.data.simulation.hinge import Hinge
from scalecryo.data.simulation.imperfections import draw_conditions, with_defocus_errors, with_preferred_views
from scalecryo.data.simulation.micelle import with_micelle
from scalecryo.data.simulation.particles import draw_particles
from scalecryo.data.simulation.projector import Projector
from scalecryo.data.simulation.recording import Recording
from scalecryo.data.simulation.settings import Imaging, Imperfections


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
    colour: float = 0.0,
    scale_sd: float = 0.0,
    gain_sd: float = 0.0,
    junk: float = 0.0,
    neighbours: float = 0.0,
    prefer: tuple[float, float] | None = None,
    defocus_error_a: float = 0.0,
    mix: Sequence[str] = (),
    micelle: float = 0.0,
    symmetry: str = "C1",
    hinge: str | None = None,
    shares: Sequence[float] = (),
) -> None:
    """Write particles.mrcs, particles.star (no poses), truth.star (the same rows with poses) and truth.mrc.

    The variance of the noise is one for the whole stack (`Recording`). truth.star holds the true defocus and labels of
    what was added (`Conditions.labels`). truth.mrc has its ORIGIN set so that it lies on the structure's own
    coordinates; further conformers and structures are in truth_2.mrc and so on.
    """
    check_simulate(structure, out_dir, n=n, box=box, pixel_size=pixel_size, snr_db=snr_db, defocus_um=defocus_um,
                     astigmatism_um=astigmatism_um, shift_a=shift_a, colour=colour, scale_sd=scale_sd, gain_sd=gain_sd,
                     junk=junk, neighbours=neighbours, prefer=prefer, defocus_error_a=defocus_error_a, mix=mix,
                     micelle=micelle, symmetry=symmetry, hinge=hinge)  # fmt: skip
    sources, turns = (structure, *mix), None if hinge is None else Hinge.parse(hinge)
    kinds = len(mix) + (1 if turns is None else turns.steps)
    maps = truth_maps(kinds)
    wanted = Imperfections(colour, scale_sd, gain_sd, junk, neighbours, prefer, defocus_error_a)
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_particles(n, Imaging(pixel_size, defocus_um, astigmatism_um, shift_a), "particles.mrcs", generator)
    table = with_preferred_views(drawn, prefer, seed)
    told = with_defocus_errors(table, defocus_error_a, seed)
    conditions = draw_conditions(n, wanted, kinds, seed, shares)
    bare, origin = densities(sources, box, pixel_size, symmetry, turns, seed)
    volumes = [with_micelle(volume, pixel_size, micelle) for volume in bare]
    projectors = [Projector(volume, pixel_size) for volume in volumes]
    extent = max(diameter(volume, pixel_size) for volume in volumes)
    recording = Recording(projectors, extent, table, conditions, wanted, snr_db, generator, seed)
    names, labels = table.image_names(), conditions.labels(wanted, kinds)
    micrographs = {"rlnMicrographName": labels["rlnMicrographName"]}
    try:
        _write_images(urls.join(out_dir, "particles.mrcs"), recording)
        for name, volume in zip(maps, volumes, strict=True):
            write_map(urls.join(out_dir, name), volume.numpy(), pixel_size, origin)
        write_particles(urls.join(out_dir, "truth.star"), names, table, True, box, more=labels)
        write_particles(urls.join(out_dir, "particles.star"), names, told, False, box, more=micrographs)
    except BaseException:
        # None of them was there before: what is left now would only stand in the way of the next try.
        for name in (*SIMULATED, *maps):
            urls.remove_tree(urls.join(out_dir, name))
        raise
    noise = "without noise" if snr_db is None else f"{snr_db:g} dB"
    say(f"{urls.redacted(out_dir)}: {n:,} particles, {box} px, {pixel_size:g} Å/px, {noise}")


def _write_images(path: str, recording: Recording) -> None:
    """Make and write the stack chunk by chunk, telling how far it is."""
    count, done = len(recording), 0
    progress = Progress("made")
    progress(0, count)
    with StackWriter(path, count, recording.box_size, recording.pixel_size) as stack:
        for images in recording.chunks():
            stack.append(images.numpy())
            done += len(images)
            progress(done, count)
