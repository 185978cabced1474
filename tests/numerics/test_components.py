"""Probabilistic PCA from images: E-step against dense Gaussian algebra, M-step against dense normal equations."""

import numpy as np
import pytest
import torch

from scalecryo.map.components import ComponentSums, Latents, insert_channels, nested_evidence, posterior, products
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import insert_slices
from scalecryo.physics.kernels.cpu_channels import insert_channels_cpu
from scalecryo.physics.rotation import random_rotations

BOX, COUNT, Q = 8, 6, 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def complex_normal(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.complex(torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))


def test_posterior_and_evidence_are_those_of_a_dense_normal_distribution() -> None:
    rng, pixels = generator(), fourier_pixels(BOX)
    slices = 0.3 * complex_normal(COUNT, Q, len(pixels), rng=rng)
    residual = complex_normal(COUNT, len(pixels), rng=rng)
    weight = pixels.weight / (0.5 + pixels.shell)
    gram, product = products(slices, residual, weight)
    found = posterior(gram, product)
    steps = nested_evidence(gram, product, 0)
    for i in range(COUNT):
        # Real vectors whose noise is N(0, 1): y = L z + e, so z and y are jointly normal.
        root = weight.sqrt().numpy()
        loading = np.concatenate([(slices[i].numpy() * root).real, (slices[i].numpy() * root).imag], 1).T
        seen = np.concatenate([(residual[i].numpy() * root).real, (residual[i].numpy() * root).imag])
        marginal = loading @ loading.T + np.eye(len(seen))
        gain = loading.T @ np.linalg.inv(marginal)
        # Single precision sums of some 50 terms.
        np.testing.assert_allclose(found.mean[i], gain @ seen, atol=1e-5)
        np.testing.assert_allclose(found.covariance[i], np.eye(Q) - gain @ loading, atol=1e-5)
        evidence = []
        for k in range(Q + 1):
            part = loading[:, :k] @ loading[:, :k].T + np.eye(len(seen))
            evidence.append(-0.5 * seen @ np.linalg.solve(part, seen) - 0.5 * np.linalg.slogdet(part)[1])
        assert float(found.evidence[i]) == pytest.approx(evidence[-1] - evidence[0], abs=1e-3)
        np.testing.assert_allclose(steps[i], np.diff(evidence), atol=1e-3)


def test_channels_are_inserted_as_slices_are() -> None:
    """Both ways against the insertion of one value a sample, which other tests compare with its adjoint."""
    rng, pixels, box = generator(), fourier_pixels(BOX), 2 * BOX
    rotation = random_rotations(COUNT, rng).float()
    values, power = complex_normal(COUNT, len(pixels), rng=rng), torch.rand(COUNT, len(pixels), generator=rng)
    first, second = torch.randn(COUNT, 2, generator=rng), torch.rand(COUNT, 3, generator=rng)
    grids = torch.zeros(2, box, box, box // 2 + 1, 7)
    where = rotation, pixels.kx, pixels.ky, 2.0
    for insert, grid in zip((insert_channels_cpu, insert_channels), grids, strict=True):
        insert(values, power, first, second, *where, grid)
        for number in range(2):
            own = torch.view_as_complex(grid[..., 2 * number : 2 * number + 2].contiguous())
            torch.testing.assert_close(own, insert_slices(values * first[:, number, None], *where, box))
        for number in range(3):
            torch.testing.assert_close(
                grid[..., 4 + number], insert_slices(power * second[:, number, None], *where, box)
            )


def test_m_step_is_the_solution_of_the_normal_equations() -> None:
    """At voxels hit by samples alone: images on the grid's axes, so that interpolation plays no part."""
    rng, pixels = generator(), fourier_pixels(BOX)
    data, power = complex_normal(COUNT, len(pixels), rng=rng), torch.rand(COUNT, len(pixels), generator=rng) + 0.5
    mean = torch.randn(COUNT, Q, generator=rng)
    spread = torch.randn(COUNT, Q, Q, generator=rng)
    covariance = spread @ spread.mT
    latents = Latents(mean, covariance, torch.zeros(COUNT, dtype=torch.float64))
    rotation = torch.eye(3).expand(COUNT, 3, 3).contiguous()
    sums = ComponentSums(BOX, Q)
    weight, half = torch.rand(COUNT, generator=rng) + 0.5, torch.tensor([1, 1, 1, 2, 2, 1])
    sums.add(data, power, latents, rotation, weight, half, pixels)
    ridge = torch.rand(2, Q, BOX, generator=rng)
    scattered = {}
    solve = sums._solve

    def kept(voxels: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        scattered[len(scattered)] = solve(voxels, prior)
        return scattered[len(scattered) - 1]

    sums._solve = kept  # type: ignore[method-assign]
    for half_number in (1, 2):
        sums.solve(half_number, ridge[half_number - 1], BOX / 2 - 1)
    d = sums.padded_box
    line = torch.fft.fftfreq(d, 1 / d)
    squared = (line[:, None, None] ** 2 + line[:, None] ** 2 + line[: d // 2 + 1] ** 2).flatten()
    inside = (squared <= (2 * (BOX / 2 - 1)) ** 2).nonzero()[:, 0].tolist()
    for p in (3, 7, 11):
        x, y = 2 * int(pixels.kx[p]), 2 * int(pixels.ky[p])
        if x == 0:
            continue
        flat = (0 * d + y % d) * (d // 2 + 1) + x
        shell = round(float(torch.hypot(pixels.kx[p], pixels.ky[p])))
        for number in (0, 1):
            own = half == number + 1
            second = covariance + mean[:, :, None] * mean[:, None, :]
            matrix = (weight[own] * power[own, p])[:, None, None] * second[own]
            matrix = matrix.sum(0).double() + torch.diag(ridge[number, :, shell].double())
            right = ((weight[own] * data[own, p])[:, None] * mean[own]).sum(0).to(torch.complex128)
            expected = torch.linalg.solve(matrix.to(torch.complex128), right)
            found = scattered[number][inside.index(flat)]
            # 1e-5 of the trace is added to the diagonal; single precision.
            torch.testing.assert_close(found.to(torch.complex128), expected, rtol=1e-3, atol=1e-4)
