"""Numbers to bytes and back."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.images import decode_into, encode_image, encode_png, image_grid, to_model_range, to_uint8


def encoded(mode: str, image_format: str, size: tuple[int, int] = (5, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color=255 if mode in ("L", "1") else None).save(buffer, format=image_format)
    return buffer.getvalue()


def some_pixels(channels: int) -> torch.Tensor:
    return torch.randint(0, 256, (channels, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_all_256_bytes_survive_the_way_to_model_values_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_model_range(pixels)), pixels)


def test_bytes_map_to_the_ends_of_the_model_range():
    x = to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert x.tolist() == [-1.0, 1.0]


def test_the_model_range_is_that_of_the_paper_s_code():
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert torch.equal(to_model_range(pixels), expected)


@pytest.mark.parametrize(
    ("value", "byte"),
    [
        (-1.0, 0),
        (1.0, 255),
        (0.0, 128),  # 127.5 is a tie, and ties go to the even number
        (0.4 / 127.5 - 1, 0),
        (0.6 / 127.5 - 1, 1),
        (1 - 0.4 / 127.5, 255),
        (1 - 0.6 / 127.5, 254),
        (-7.0, 0),
        (7.0, 255),
    ],
)
def test_model_values_are_clamped_and_rounded_to_the_nearest_byte(value, byte):
    assert to_uint8(torch.tensor([value])).tolist() == [byte]


def test_ties_are_rounded_to_even():
    x = (torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64) / 127.5 - 1).float()
    scaled = x.add(1).mul(127.5)
    assert to_uint8(x).tolist() == scaled.round().to(torch.uint8).tolist()


def test_conversions_leave_their_argument_alone():
    pixels, x = torch.tensor([7], dtype=torch.uint8), torch.tensor([0.3])
    to_model_range(pixels)
    to_uint8(x)
    assert pixels.tolist() == [7]
    assert x.tolist() == [pytest.approx(0.3)]


def test_half_precision_values_become_the_bytes_of_their_float32_values():
    x = torch.linspace(-1.2, 1.2, 999).half()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def decode(data, shape):
    """Channels first, as the pixels that were encoded."""
    out = np.zeros((*shape[1:], shape[0]), dtype=np.uint8)
    decode_into(data, out)
    return out.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("image_format", "quality"), [("png", 1), ("webp", 100)])
def test_png_and_webp_of_quality_100_are_lossless(channels, image_format, quality):
    if (channels, image_format) == (1, "webp"):
        pytest.skip("WebP has no grey images")
    pixels = some_pixels(channels)
    assert np.array_equal(decode(encode_image(pixels, image_format, quality), pixels.shape), pixels.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_decoded_as_pillow_does(channels):
    data = encode_image(some_pixels(channels), "jpeg", 90)
    expected = np.asarray(Image.open(io.BytesIO(data))).reshape(*some_pixels(channels).shape[1:], channels)
    assert np.array_equal(decode(data, some_pixels(channels).shape), expected.transpose(2, 0, 1))


def test_the_same_pixels_give_the_same_png():
    assert encode_png(some_pixels(3)) == encode_png(some_pixels(3))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 3, 6)])
def test_an_image_of_another_size_is_refused_with_both_shapes(image_format, shape):
    with pytest.raises(ValueError, match=rf"expected {shape[1]}x{shape[2]}x3 .*, found 3x5x3 RGB"):
        decode(encoded("RGB", image_format), shape)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("LA", 1), ("I;16", 1)])
def test_other_channels_and_depths_are_refused_and_not_converted(mode, channels):
    with pytest.raises(ValueError, match="expected 3x5x"):
        decode(encoded(mode, "PNG"), (channels, 3, 5))


def test_decoded_pixels_keep_row_and_column():
    pixels = torch.zeros(3, 4, 6, dtype=torch.uint8)
    pixels[1, 2, 5] = 200
    assert np.argwhere(decode(encode_png(pixels), pixels.shape)).tolist() == [[1, 2, 5]]


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded("RGB", "PNG")[:40], encoded("RGB", "JPEG")[:100], b"\x89PNG\r\n\x1a\n" + b"\0" * 50],
    ids=["empty", "text", "truncated png", "truncated jpeg", "png header alone"],
)
def test_broken_bytes_are_refused_with_one_kind_of_error(data):
    with pytest.raises(ValueError, match="not a"):
        decode(data, (3, 3, 5))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_an_image_file_is_refused_wherever_it_was_cut(image_format):
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, format=image_format)
    data = buffer.getvalue()
    for cut in range(0, len(data) - 12, max(1, len(data) // 40)):
        with pytest.raises(ValueError, match="not a"):
            decode(data[:cut], (3, 24, 24))


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(image_format):
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP image"):
        decode(encoded("RGB", image_format), (3, 3, 5))


def test_an_image_is_decoded_into_its_place_and_nowhere_else():
    batch = np.full((3, 6, 9, 3), 7, dtype=np.uint8)
    decode_into(encode_png(some_pixels(3)), batch[1])
    assert np.array_equal(batch[1], some_pixels(3).permute(1, 2, 0).numpy())
    assert (batch[[0, 2]] == 7).all()


def test_jpeg_keeps_the_resolution_of_colour():
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    pixels[0, :, ::2] = 200  # red and black columns: at half the resolution they would be one colour
    columns = decode(encode_image(pixels, "jpeg", 100), pixels.shape)[0].astype(int)
    assert (columns[:, ::2] - columns[:, 1::2]).min() > 150


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_a_lower_quality_takes_fewer_bytes(image_format):
    pixels = some_pixels(3).repeat(1, 4, 4)
    assert len(encode_image(pixels, image_format, 30)) < len(encode_image(pixels, image_format, 95))


def test_a_png_with_a_damaged_checksum_is_refused():
    data = bytearray(encode_png(some_pixels(3)))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    with pytest.raises(ValueError, match="not a readable image"):
        decode(bytes(data), some_pixels(3).shape)


def test_an_image_that_claims_to_be_huge_is_refused_before_memory_is_taken():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )
    tracemalloc.start()
    with pytest.raises(ValueError, match="60000"):
        decode(bomb, (3, 3, 5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_grid_lays_images_out_row_by_row_with_white_gaps():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    w = 255
    assert image_grid(images, min_side=1, gap=1)[0].tolist() == [
        [w, w, w, w, w, w, w],
        [w, 0, 0, w, 1, 1, w],
        [w, 0, 0, w, 1, 1, w],
        [w, w, w, w, w, w, w],
        [w, 2, 2, w, w, w, w],
        [w, 2, 2, w, w, w, w],
        [w, w, w, w, w, w, w],
    ]


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3), (64, 8, 8)])
def test_a_grid_is_as_square_as_it_can_be(batch, rows, columns):
    sheet = image_grid(torch.zeros(batch, 3, 4, 4, dtype=torch.uint8), min_side=1, gap=0)
    assert sheet.shape == (3, rows * 4, columns * 4)


def test_a_small_grid_is_enlarged_by_whole_pixels():
    images = torch.tensor([10, 20], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert image_grid(images, min_side=5, gap=0)[0].tolist() == [[10, 10, 10, 20, 20, 20]] * 3


def test_a_grid_that_is_wide_enough_is_not_enlarged():
    assert image_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), min_side=8, gap=0).shape == (1, 8, 8)


def test_a_jpeg_with_a_long_trailer_is_read_and_one_cut_behind_its_thumbnail_is_refused():
    plain = encode_image(some_pixels(3), "jpeg", 90)
    assert decode(plain + b"\x00movie" * 5000, some_pixels(3).shape).shape == some_pixels(3).shape
    thumbnail = b"Exif\0\0" + plain
    with_thumbnail = plain[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + plain[2:]
    assert np.array_equal(decode(with_thumbnail, some_pixels(3).shape), decode(plain, some_pixels(3).shape))
    with pytest.raises(ValueError, match="cut off"):
        decode(with_thumbnail[:-10], some_pixels(3).shape)
