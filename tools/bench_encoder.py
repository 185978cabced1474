"""Which encoder learns most in a second? Networks taught the true poses of one dataset, for the same time each.

    python tools/bench_encoder.py FOLDER [--seconds 60] [--batch 64]

FOLDER is a dataset of tools/paper_datasets.py: the first 9,000 images teach, the last 1,000 are asked. Regressions (6
numbers made orthonormal, s2s2) learn the squared distance to the nearest of the true pose's mates under the map's
pseudo-symmetry; the guided method's encoder learns its distribution over 4,608 rotations. Images are turned in their
plane at random, by quarters. Time is the processor's, of one thread where OMP_NUM_THREADS=1; batches are made outside
of it.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mrcfile
import torch
from torch import Tensor, nn

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.evaluate.align_maps import rotational_symmetry
from scalecryo.model.encoder import PoseEncoder
from scalecryo.model.grid_encoder import GridEncoder, encoder_features
from scalecryo.physics.fft import fourier_crop_2d, fourier_pixels, rfft2_centred
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import geodesic_angle, s2s2_to_rotation
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.modes import soft_labels
from scalecryo.pose.search import with_flips

TEST, GRID, GRID_RADIUS, WIDTH_DEG = 1000, 2304, 12.0, 8.0
Network = Callable[[Tensor], Tensor]


class Unshuffled(nn.Module):
    """The paper's network behind a stem that folds 4 x 4 px into channels, with its first two pools left out."""

    def __init__(self, box: int, fold: int = 4) -> None:
        super().__init__()
        self.fold = nn.PixelUnshuffle(fold)
        self.inner = PoseEncoder(box // fold, (32, 64, 128), 512, 1, 6, torch.bfloat16)
        first = self.inner.convolutions[0]
        self.inner.convolutions[0] = nn.Conv2d(fold * fold, first.out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            folded = self.fold(images[:, None]).contiguous(memory_format=torch.channels_last)
            return self.inner.perceptron(self.inner.convolutions(folded)).float()[:, None]


def nearest_error(found: Tensor, mates: Tensor) -> Tensor:
    """Degrees to the nearest mate."""
    return geodesic_angle(*torch.broadcast_tensors(found[:, None], mates)).amin(1)


def batches(images: Tensor, mates: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end; every image turned by a quarter or none, and its poses with it."""
    generator = torch.Generator().manual_seed(0)
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            turns = int(torch.randint(4, (1,), generator=generator))
            # The box's centre is at N // 2: row and column 0 have no partner, and are rolled back to the edge.
            turned = torch.rot90(images[rows], turns, (1, 2))
            rolled = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1)}[turns]
            yield torch.roll(turned, rolled, (1, 2)), mates[rows] @ torch.matrix_power(quarter, turns)


def regression(model: nn.Module) -> tuple[Network, Callable[[Tensor, Tensor], Tensor]]:
    """A network's rotations, and its loss."""

    def rotations(images: Tensor) -> Tensor:
        return s2s2_to_rotation(model(images)[:, 0])

    def loss(images: Tensor, mates: Tensor) -> Tensor:
        return (rotations(images)[:, None] - mates).square().sum((-2, -1)).amin(1).mean()

    return rotations, loss


def classification(box: int) -> tuple[nn.Module, Network, Callable[[Tensor, Tensor], Tensor]]:
    """The guided method's encoder."""
    pixels = fourier_pixels(box, GRID_RADIUS)
    grid = with_flips(so3_grid(GRID))
    model = GridEncoder(grid, len(pixels), 1024, 0.0)

    def predicted(images: Tensor) -> tuple[Tensor, object]:
        features = encoder_features(pixels.pack(rfft2_centred(images)), None, pixels.weight * (pixels.radius > 0))
        with torch.autocast("cpu", torch.bfloat16):
            found = model(features)
        return found.logits.float(), found._replace(logits=found.logits.float())

    def loss(images: Tensor, mates: Tensor) -> Tensor:
        poses = PoseCandidates(mates, mates.new_zeros(*mates.shape[:2], 2), mates.new_zeros(mates.shape[:2]))
        index, share = soft_labels(poses, grid, width_deg=WIDTH_DEG, nearest=16)
        return -(predicted(images)[0].log_softmax(1).gather(1, index) * share).sum(1).mean()

    return model, lambda images: model.own_rotation(predicted(images)[1]), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    with mrcfile.mmap(arguments.folder / "particles.mrcs", permissive=True) as stack:
        images = torch.from_numpy(stack.data.astype("float32"))
    images = images / images.std()
    truth = torch.from_numpy(read_poses(str(arguments.folder / "truth.star")).rotation).float()
    symmetry = rotational_symmetry(torch.from_numpy(read_map(str(arguments.folder / "truth.mrc"))[0]))
    mates, box = torch.einsum("gij,njk->ngik", symmetry, truth), images.shape[-1]
    known, asked = slice(0, len(images) - TEST), slice(len(images) - TEST, None)

    def paper(size: int, precision: torch.dtype) -> nn.Module:
        return PoseEncoder(size, (32, 64, 128), 512, 1, 6, precision)

    torch.manual_seed(0)
    networks = {f"paper's, {box} px, float32": (paper(box, torch.float32), box)}
    for size in (box, box // 2, box // 4):
        networks[f"paper's, {size} px, bfloat16"] = paper(size, torch.bfloat16), size
    networks["PixelUnshuffle(4) stem, bfloat16"] = Unshuffled(box), box
    contenders = {name: (model, size, *regression(model)) for name, (model, size) in networks.items()}
    model, *rest = classification(box // 4)
    contenders[f"guided: grid, radius {GRID_RADIUS:g}, bfloat16"] = model, box // 4, *rest
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{arguments.folder.parent.name}, {arguments.seconds:g} s each")  # fmt: skip
    print("| encoder | images/s | passes | median error, ° | mean |\n| --- | --- | --- | --- | --- |")
    for name, (model, size, rotations, loss) in contenders.items():
        small = fourier_crop_2d(images, size) if size < box else images
        small = small / small.std()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3 if "grid" in name else 3e-4, fused=True)
        spent, seen, coming = 0.0, 0, batches(small[known], mates[known], arguments.batch)
        while spent < arguments.seconds:
            batch = next(coming)
            start = time.process_time()
            optimiser.zero_grad(set_to_none=True)
            loss(*batch).backward()
            optimiser.step()
            spent, seen = spent + time.process_time() - start, seen + len(batch[0])
        with torch.no_grad():
            errors = nearest_error(torch.cat([rotations(part) for part in small[asked].split(250)]), mates[asked])
        print(f"| {name} | {seen / spent:.0f} | {seen / (len(images) - TEST):.1f} | {errors.median():.1f} | "
              f"{errors.mean():.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
