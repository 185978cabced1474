"""Centring, packing and bad boxes."""

import pytest
import torch

from scalecryo.errors import InputError
from scalecryo.physics import fft
from scalecryo.physics.fft import (
    fourier_crop_2d,
    fourier_pixels,
    fourier_resize_3d,
    irfft2_centred,
    irfft3_centred,
    rfft2_centred,
    rfft3_centred,
)


def test_a_point_at_the_centre_has_a_constant_transform():
    image, volume = torch.zeros(2, 8, 8), torch.zeros(8, 8, 8)
    image[:, 4, 4], volume[4, 4, 4] = 1, 1
    ones = torch.ones((), dtype=torch.complex64)
    torch.testing.assert_close(rfft2_centred(image), ones.expand(2, 8, 5))
    torch.testing.assert_close(rfft3_centred(volume), ones.expand(8, 8, 5))
    torch.testing.assert_close(rfft3_centred(volume, 12), ones.expand(12, 12, 7))


def test_a_point_off_the_centre_turns_the_phase_backwards():
    image = torch.zeros(8, 8)
    image[4, 5] = 1  # x = +1
    phase = rfft2_centred(image)[0].angle()
    torch.testing.assert_close(phase[:4], -2 * torch.pi * torch.arange(4) / 8)


def test_round_trips():
    images, volume = torch.randn(3, 10, 10), torch.randn(10, 10, 10)
    torch.testing.assert_close(irfft2_centred(rfft2_centred(images), 10), images)
    torch.testing.assert_close(irfft3_centred(rfft3_centred(volume), 10), volume)
    torch.testing.assert_close(irfft3_centred(rfft3_centred(volume, 16), 10), volume)


def test_a_batch_without_images_has_transforms_too() -> None:
    """A worker may have no image of a batch that others have."""
    assert rfft2_centred(torch.zeros(0, 8, 8)).shape == (0, 8, 5)
    assert rfft2_centred(torch.zeros(0, 8, 8)).dtype == torch.complex64


@pytest.mark.parametrize("box", [8, 30])
def test_pixels_are_a_half_disc_in_order_of_radius(box: int):
    pixels = fourier_pixels(box)
    limit = box // 2 - 1
    expected = sorted(
        (kx**2 + ky**2, kx, ky)
        for kx in range(limit + 1)
        for ky in range(-limit, limit + 1)
        if kx**2 + ky**2 <= limit**2
    )
    assert len(pixels) == len(expected)
    assert (pixels.kx**2 + pixels.ky**2).tolist() == [row[0] for row in expected]
    assert sorted(zip(pixels.kx.tolist(), pixels.ky.tolist(), strict=True)) == sorted(row[1:] for row in expected)
    assert pixels.weight.tolist() == [1.0 if kx == 0 else 2.0 for kx in pixels.kx.tolist()]
    torch.testing.assert_close(pixels.radius, torch.hypot(pixels.kx, pixels.ky))
    assert torch.equal(pixels.shell, pixels.radius.round().long())


def test_prefix_and_count():
    pixels = fourier_pixels(32)
    for radius in (0, 1, 3.5, 7, 15):
        part, alone = pixels.prefix(radius), fourier_pixels(32, radius)
        assert part.count(radius) == pixels.count(radius) == len(part) == len(alone)
        assert part.radius_limit == radius
        for name in ("kx", "ky", "radius", "shell", "weight", "index"):
            assert torch.equal(getattr(part, name), getattr(alone, name))
    assert len(pixels.prefix(100)) == len(pixels)
    assert pixels.prefix(100).radius_limit == 15


def test_pack_and_unpack():
    pixels = fourier_pixels(12, 4)
    transform = rfft2_centred(torch.randn(2, 3, 12, 12))
    packed = pixels.pack(transform)
    assert packed.shape == (2, 3, len(pixels))
    k = torch.fft.fftfreq(12, 1 / 12)
    inside = torch.hypot(k[:, None], torch.arange(7.0)) <= 4
    torch.testing.assert_close(pixels.unpack(packed), torch.where(inside, transform, 0))
    rows, columns = pixels.index // 7, pixels.index % 7
    assert torch.equal(k[rows], pixels.ky)
    assert torch.equal(columns.float(), pixels.kx)


def test_pixels_change_precision():
    pixels = fourier_pixels(8).to("cpu", torch.float64)
    assert pixels.kx.dtype == pixels.weight.dtype == torch.float64
    assert pixels.shell.dtype == pixels.index.dtype == torch.int64


def test_same_box_returns_the_input():
    images, volume = torch.randn(2, 8, 8), torch.randn(8, 8, 8)
    assert fourier_crop_2d(images, 8) is images
    assert fourier_resize_3d(volume, 8) is volume


def test_crop_keeps_batch_dimensions():
    assert fourier_crop_2d(torch.randn(2, 3, 16, 16), 8).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rfft2_centred(torch.zeros(7, 7)),
        lambda: rfft3_centred(torch.zeros(7, 7, 7)),
        lambda: rfft3_centred(torch.zeros(8, 8, 8), 11),
        lambda: rfft3_centred(torch.zeros(8, 8, 8), 6),
        lambda: irfft2_centred(torch.zeros(7, 4, dtype=torch.complex64), 7),
        lambda: irfft3_centred(torch.zeros(8, 8, 5, dtype=torch.complex64), 10),
        lambda: fourier_crop_2d(torch.zeros(8, 8), 10),
        lambda: fourier_crop_2d(torch.zeros(8, 8), 5),
        lambda: fourier_crop_2d(torch.zeros(9, 9), 8),
        lambda: fourier_resize_3d(torch.zeros(8, 8, 8), 0),
        lambda: fourier_pixels(9),
        lambda: fourier_pixels(8, 4),
        lambda: fourier_pixels(8, -1),
    ],
)
def test_bad_boxes_and_radii_are_refused_with_a_repair(call):
    with pytest.raises(InputError, match=r"\d.*: (crop|give|lower)"):
        call()


def test_a_quarter_turn_of_the_packed_pixels_is_that_of_the_image() -> None:
    # Reference: the image turned in real space, about the centre pixel, as rot90 of all but its first row and column.
    image = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image[0], image[:, 0] = 0, 0
    turned = torch.zeros_like(image)
    turned[1:, 1:] = torch.rot90(image[1:, 1:], -1)  # rows are y: from x towards y
    pixels = fourier_pixels(16)
    source, is_partner = pixels.quarter_turn()
    packed = pixels.pack(rfft2_centred(image))[source]
    packed = torch.where(is_partner, packed.conj(), packed)
    assert torch.allclose(packed, pixels.pack(rfft2_centred(turned)), atol=1e-12)


@pytest.mark.parametrize("slab", [1, 700, 10**6])
@pytest.mark.parametrize(("box", "padded"), [(16, 32), (12, 20), (16, 16)])
def test_large_boxes_are_transformed_axis_by_axis_to_the_same(
    monkeypatch: pytest.MonkeyPatch, box: int, padded: int, slab: int
) -> None:
    # Reference: torch's transform of the whole cube. Double precision: only the order of the axes differs.
    volume = torch.randn(box, box, box, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = rfft3_centred(volume, padded)
    back = irfft3_centred(whole, box)
    monkeypatch.setattr(fft, "LARGE_BOX", 0)
    monkeypatch.setattr(fft, "SLAB", slab)
    torch.testing.assert_close(rfft3_centred(volume, padded), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    torch.testing.assert_close(irfft3_centred(whole, box), back, rtol=0, atol=1e-13)
    torch.testing.assert_close(back, volume, rtol=0, atol=1e-12)


def test_slabs_cover_an_axis_once() -> None:
    for rows, row in ((7, 1), (7, fft.SLAB), (1000, fft.SLAB // 3)):
        found = [index for some in fft.slabs(rows, row) for index in range(rows)[some]]
        assert found == list(range(rows))
