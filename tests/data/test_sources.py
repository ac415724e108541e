"""Sources: digits and folders, and how any picture becomes a square of uint8."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.data.sources import fit_image, open_source
from pipeline.errors import UserError, WorldError


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)
    return path


def solid(height, width, colour):
    return np.broadcast_to(np.asarray(colour, dtype=np.uint8), (height, width, len(colour)))


def folder_of(tmp_path, files, **options):
    for name, colour in files.items():
        save(tmp_path / name, solid(6, 6, colour))
    return open_source(f"folder:{tmp_path}", **{"image_size": 6, **options})


def sample(source, index):
    return next(source.samples(index, source.read(index, index + 1)))


def labels(source):
    return [each.label for each in source.samples(0, source.read(0, min(len(source), 200)))]


def test_digits_are_1797_labelled_grey_8x8_images():
    source = open_source("digits")
    assert (len(source), source.image_size, source.image_channels) == (1797, 8, 1)
    assert source.class_names == tuple("0123456789")
    first = sample(source, 0)
    assert (first.key, first.label, first.pixels.dtype, first.pixels.shape) == ("000000000", 0, torch.uint8, (1, 8, 8))
    assert set(labels(source)) == set(range(10))


def test_digits_are_scaled_from_0_16_to_0_255_by_rounding():
    from sklearn.datasets import load_digits

    expected = [round(v * 255 / 16) for v in load_digits().images[5].ravel()]
    assert sample(open_source("digits"), 5).pixels.flatten().tolist() == expected


def test_digits_can_be_had_larger_and_in_colour():
    pixels = sample(open_source("digits", image_size=16, image_channels=3), 0).pixels
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("spec", ["cifar10", "folder:", "folder", "", "s3://bucket/x", "pickle:x"])
def test_an_unknown_spec_is_refused_with_the_known_ones(spec):
    with pytest.raises(UserError, match="digits, folder:PATH"):
        open_source(spec, image_size=8)


def test_impossible_size_and_channels_are_refused():
    with pytest.raises(UserError, match="--image-size 0"):
        open_source("digits", image_size=0)
    with pytest.raises(UserError, match="--image-channels 4"):
        open_source("digits", image_channels=4)


def test_a_folder_needs_an_image_size(tmp_path):
    with pytest.raises(UserError, match="--image-size"):
        open_source(f"folder:{tmp_path}")


def test_a_missing_folder_and_one_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        open_source(f"folder:{tmp_path}/none", image_size=8)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no images under"):
        open_source(f"folder:{tmp_path}", image_size=8)


def test_the_first_sub_folder_is_the_class_and_classes_are_sorted(tmp_path):
    red, blue = (255, 0, 0), (0, 0, 255)
    source = folder_of(tmp_path, {"dog/1.png": red, "cat/deep/er/2.png": blue, "cat/1.PNG": blue})
    assert source.class_names == ("cat", "dog")
    assert source.files == ("cat/1.PNG", "cat/deep/er/2.png", "dog/1.png")
    assert labels(source) == [0, 0, 1]
    assert sample(source, 2).pixels[:, 0, 0].tolist() == list(red)


def test_files_directly_in_the_folder_have_no_class(tmp_path):
    source = folder_of(tmp_path, {"b.png": (1, 2, 3), "a.bmp": (4, 5, 6)})
    assert source.class_names == ()
    assert labels(source) == [None, None]
    assert sample(source, 0).pixels[:, 3, 3].tolist() == [4, 5, 6]


def test_loose_images_beside_class_folders_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"sheet\.png lies beside the class folders"):
        folder_of(tmp_path, {"cat/1.png": (0, 0, 0), "sheet.png": (0, 0, 0)})


def test_hidden_files_and_other_extensions_are_not_images(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.png").write_bytes(b"x")
    assert folder_of(tmp_path, {"a.png": (0, 0, 0)}).files == ("a.png",)


def test_a_wide_picture_is_cut_to_its_centre_square(tmp_path):
    array = np.zeros((4, 10, 3))
    array[:, 3:7] = 200
    save(tmp_path / "wide.png", array)
    pixels = sample(open_source(f"folder:{tmp_path}", image_size=4), 0).pixels
    assert pixels.shape == (3, 4, 4)
    assert pixels.unique().tolist() == [200]


def test_shrinking_is_antialiased():
    # One-pixel stripes: point sampling would give black or white, an antialiased filter the grey between.
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    middle = fit_image(Image.fromarray(stripes), 8, 1)[:, 1:-1, 1:-1].float()
    assert (middle - 127.5).abs().max() < 12


def test_a_picture_of_the_right_size_is_not_resampled():
    array = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(Image.fromarray(array), 9, 3).numpy(), array.transpose(2, 0, 1))


def test_enlarging_keeps_a_solid_colour():
    pixels = fit_image(Image.fromarray(solid(3, 3, (10, 20, 30))), 32, 3)
    assert pixels.shape == (3, 32, 32)
    assert [pixels[c].unique().tolist() for c in range(3)] == [[10], [20], [30]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    layer = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 4, 2))
    picture = layer.quantize(4) if mode == "P" else layer.convert(mode)
    pixels = fit_image(picture, 4, 3)
    assert pixels[:, :2].unique().tolist() == [0]
    assert pixels[:, 2:].unique().tolist() == [255]


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((8, 8, 3))
    array[:4] = 255  # bright on top as stored; orientation 6 turns it a quarter clockwise: bright at the right
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.png", array, exif=exif)
    pixels = sample(open_source(f"folder:{tmp_path}", image_size=8), 0).pixels
    assert pixels[:, :, 4:].unique().tolist() == [255]
    assert pixels[:, :, :4].unique().tolist() == [0]


def test_colour_becomes_grey_and_grey_becomes_colour_as_asked(tmp_path):
    save(tmp_path / "grey.png", np.full((5, 5), 77))
    assert sample(open_source(f"folder:{tmp_path}", image_size=5), 0).pixels.shape == (3, 5, 5)
    grey = sample(open_source(f"folder:{tmp_path}", image_size=5, image_channels=1), 0).pixels
    assert (grey.shape, grey.unique().tolist()) == ((1, 5, 5), [77])
    assert fit_image(Image.fromarray(solid(4, 4, (255, 0, 0))), 4, 1).unique().tolist() == [76]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert sample(open_source(f"folder:{tmp_path}", image_size=4), 0).pixels.unique().tolist() == [128]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_is_refused_by_path(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    source = open_source(f"folder:{tmp_path}", image_size=4)
    with pytest.raises(UserError, match=r"bad\.png is not an image that can be read"):
        sample(source, 0)


def test_a_truncated_jpeg_is_refused_by_path(tmp_path):
    path = save(tmp_path / "cut.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg is not an image"):
        sample(open_source(f"folder:{tmp_path}", image_size=4), 0)


def test_a_file_that_vanished_is_a_fault_of_the_world(tmp_path):
    source = folder_of(tmp_path, {"a.png": (0, 0, 0)})
    (tmp_path / "a.png").unlink()
    with pytest.raises(WorldError, match=r"cannot read .*a\.png"):
        sample(source, 0)


def test_sources_survive_pickling(tmp_path):
    for source in (open_source("digits"), folder_of(tmp_path, {"x/a.png": (9, 9, 9)})):
        copy = pickle.loads(pickle.dumps(source))
        assert copy == source
        assert torch.equal(sample(copy, 0).pixels, sample(source, 0).pixels)


def test_the_inventory_changes_with_names_and_sizes_of_files(tmp_path):
    before = folder_of(tmp_path, {"a.png": (0, 0, 0)}).inventory()
    assert folder_of(tmp_path, {}).inventory() == before
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (6, 6, 3)))
    resized = folder_of(tmp_path, {}).inventory()
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({before, resized, folder_of(tmp_path, {}).inventory()}) == 3


def test_the_inventory_of_an_s3_folder_changes_with_content_of_the_same_size(bucket):
    inventories = []
    for colour in ((1, 2, 3), (1, 2, 4)):
        buffer = io.BytesIO()
        Image.fromarray(solid(4, 4, colour)).save(buffer, "BMP")
        storage.write_bytes(f"{bucket}/pets/cat/a.bmp", buffer.getvalue())
        inventories.append(open_source(f"folder:{bucket}/pets", image_size=4).inventory())
    assert inventories[0] != inventories[1]


def test_an_s3_folder_is_listed_and_read(tmp_path, bucket):
    path = save(tmp_path / "a.png", solid(4, 4, (1, 2, 3)))
    storage.write_bytes(f"{bucket}/pets/cat/a.png", path.read_bytes())
    storage.write_bytes(f"{bucket}/pets/cat/notes.txt", b"x")
    source = open_source(f"folder:{bucket}/pets/", image_size=4)
    assert (source.name, source.class_names) == (f"folder:{bucket}/pets", ("cat",))
    assert sample(source, 0).pixels[:, 0, 0].tolist() == [1, 2, 3]


def test_reading_a_range_gives_the_same_samples_as_reading_one_by_one():
    source = open_source("digits")
    together = list(source.samples(5, source.read(5, 9)))
    assert [each.key for each in together] == [f"{index:09d}" for index in range(5, 9)]
    for index, each in enumerate(together, 5):
        assert torch.equal(each.pixels, sample(source, index).pixels)


def test_an_unknown_crop_is_refused():
    with pytest.raises(UserError, match="center, pad, stretch"):
        open_source("digits", crop="tile")


def test_padding_frames_a_wide_picture_in_white():
    pixels = fit_image(Image.fromarray(solid(4, 8, (10, 20, 30))), 8, 3, "pad")
    assert pixels[0, 2:6].unique().tolist() == [10]
    assert pixels[:, :2].unique().tolist() == pixels[:, 6:].unique().tolist() == [255]


def test_padding_keeps_at_least_one_pixel_of_a_thin_line():
    assert fit_image(Image.fromarray(solid(1, 200, (0, 0, 0))), 8, 1, "pad").unique().tolist() == [0, 255]


def test_stretching_keeps_both_ends_of_a_wide_picture():
    halves = np.zeros((4, 16), dtype=np.uint8)
    halves[:, 8:] = 255
    pixels = fit_image(Image.fromarray(halves), 4, 1, "stretch")
    assert pixels.shape == (1, 4, 4)
    assert (pixels[:, :, 0].unique().tolist(), pixels[:, :, 3].unique().tolist()) == ([0], [255])


@pytest.mark.parametrize("crop", ["center", "pad", "stretch"])
def test_a_square_picture_of_the_right_size_is_the_same_under_every_crop(crop):
    array = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(Image.fromarray(array), 9, 3, crop).numpy(), array.transpose(2, 0, 1))


def png_that_claims(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("size", [(16_001, 8_000), (30_000, 30_000)])
def test_an_image_that_claims_too_many_pixels_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(*size))
    with pytest.raises(UserError, match=r"bomb\.png has more than the 128 megapixels"):
        sample(open_source(f"folder:{tmp_path}", image_size=4), 0)


def test_a_large_image_below_the_limit_is_read_without_a_warning(tmp_path):
    Image.new("L", (9_500, 9_500), 7).save(tmp_path / "large.png", compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = sample(open_source(f"folder:{tmp_path}", image_size=4, image_channels=1), 0).pixels
    assert pixels.unique().tolist() == [7]


def test_other_formats_are_refused_even_under_the_name_of_an_image(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "tiff.png", format="TIFF")
    with pytest.raises(UserError, match=r"tiff\.png is not an image .*PNG, JPEG, WEBP, BMP"):
        sample(open_source(f"folder:{tmp_path}", image_size=4), 0)
