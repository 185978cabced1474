"""Does the search's ranking survive coarser arithmetic? float32, TF32 and bfloat16 products, side by side.

    python tools/bench_search.py FOLDER [--particles 400] [--radius 8 12 16]

FOLDER is what `scalecryo simulate` wrote (or tools/paper_datasets.py): particles.mrcs, truth.star, truth.mrc. The same
images are scored against templates of the true map, 4,608 rotations, without CTFs. TF32 and bfloat16 are those of
tensor cores: inputs rounded to 10 and 7 bits of mantissa, products summed up in float32. Said of each: images whose
best hypothesis is still the same one; whose six best separated modes hold one within the grid's reach of the true pose
(or of its pseudo-symmetric mate); the error of the scores beside what parts the best hypothesis from the second.
"""

import argparse
import os
from pathlib import Path

import mrcfile
import torch
from torch import Tensor

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.evaluate.align_maps import rotational_symmetry
from scalecryo.physics.fft import fourier_crop_2d, fourier_pixels, fourier_resize_3d, rfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.search import grid_posterior, shift_grid, templates, turned_grid, with_flips

HALF_GRID, MODES, KEEP, APART_DEG, REACH_DEG = 2304, 6, 200, 15.0, 15.0


def rounded(values: Tensor, bits: int) -> Tensor:
    """To so many bits of mantissa, to nearest."""
    if values.is_complex():
        return torch.complex(rounded(values.real, bits), rounded(values.imag, bits))
    drop = 23 - bits
    raw = values.contiguous().view(torch.int32)
    return ((raw + (1 << (drop - 1))) & -(1 << drop)).view(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--particles", type=int, default=400)
    parser.add_argument("--radius", type=float, nargs="+", default=[8.0, 12.0, 16.0])
    arguments = parser.parse_args()
    density = torch.from_numpy(read_map(str(arguments.folder / "truth.mrc"))[0])
    with mrcfile.mmap(arguments.folder / "particles.mrcs", permissive=True) as stack:
        images = torch.from_numpy(stack.data[: arguments.particles].astype("float32"))
    truth = torch.from_numpy(read_poses(str(arguments.folder / "truth.star")).rotation[: len(images)]).float()
    # A pose and its mates under the map's pseudo-symmetry give nearly the same image.
    mates = torch.einsum("gij,njk->ngik", rotational_symmetry(density), truth)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {len(images)} images of {arguments.folder.name}")
    print("| radius | arithmetic | same best | a mode near the truth | score error, rms | best minus second, median |")
    print("| --- | --- | --- | --- | --- | --- |")
    for radius in arguments.radius:
        box = int(4 * radius)
        pixels, grid = fourier_pixels(box, radius), turned_grid(so3_grid(HALF_GRID), torch.Generator().manual_seed(0))
        small = fourier_resize_3d(density, box) * gridding_correction(box, 2.0)
        bank = templates(rfft3_centred(small, 2 * box), grid, pixels, 2.0)
        observed = pixels.pack(rfft2_centred(fourier_crop_2d(images, box)))
        # Slices at the true poses say how the images are scaled and how much of them is noise.
        clean = templates(rfft3_centred(small, 2 * box), truth, pixels, 2.0)
        scale = float((clean.conj() * observed).real.sum() / clean.abs().square().sum())
        noise = (observed - scale * clean).abs().square().mean()
        weight = pixels.weight / noise * (pixels.radius > 0)
        rotations, centred = with_flips(grid), shift_grid(0, 1)
        first: Tensor | None = None
        for name, bits in (("float32", 23), ("TF32", 10), ("bfloat16", 7)):
            one, other = (values if bits == 23 else rounded(values, bits) for values in (observed, scale * bank))
            found = grid_posterior(one, None, weight, other, centred, pixels, keep=KEEP)
            best = found.rotation_index[:, 0]
            first = found if first is None else first
            modes = separated_modes(found.candidates(rotations, centred), MODES, APART_DEG).rotation
            angle = geodesic_angle(*torch.broadcast_tensors(modes[:, :, None], mates[:, None]))
            near = (angle.flatten(1).amin(1) < REACH_DEG).float().mean()
            same = (best == first.rotation_index[:, 0]).float().mean()
            offset = (found.log_likelihood[:, 0] - first.log_likelihood[:, 0])[best == first.rotation_index[:, 0]]
            gap = (first.log_likelihood[:, 0] - first.log_likelihood[:, 1]).median()
            print(f"| {radius:g} | {name} | {100 * same:.1f} % | {100 * near:.1f} % | {offset.std():.2g} | {gap:.2g} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
