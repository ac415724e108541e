"""Sources: digits and folders, and how any picture becomes a square of uint8."""

import pickle

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


def test_digits_are_1797_labelled_grey_8x8_images():
    source = open_source("digits")
    assert (len(source), source.image_size, source.image_channels) == (1797, 8, 1)
    assert source.class_names == tuple("0123456789")
    first = source.load(0)
    assert (first.key, first.label, first.pixels.dtype, first.pixels.shape) == ("000000000", 0, torch.uint8, (1, 8, 8))
    labels = [source.load(index).label for index in range(200)]
    assert set(labels) == set(range(10))


def test_digits_are_scaled_from_0_16_to_0_255_by_rounding():
    from sklearn.datasets import load_digits

    expected = [round(v * 255 / 16) for v in load_digits().images[5].ravel()]
    assert open_source("digits").load(5).pixels.flatten().tolist() == expected


def test_digits_can_be_had_larger_and_in_colour():
    pixels = open_source("digits", image_size=16, image_channels=3).load(0).pixels
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("spec", ["cifar10", "folder:", "folder", "", "s3://bucket/x"])
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
    assert [source.load(index).label for index in range(3)] == [0, 0, 1]
    assert source.load(2).pixels[:, 0, 0].tolist() == list(red)


def test_files_directly_in_the_folder_have_no_class(tmp_path):
    source = folder_of(tmp_path, {"b.png": (1, 2, 3), "a.bmp": (4, 5, 6)})
    assert source.class_names == ()
    assert [source.load(index).label for index in range(2)] == [None, None]
    assert source.load(0).pixels[:, 3, 3].tolist() == [4, 5, 6]


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
    pixels = open_source(f"folder:{tmp_path}", image_size=4).load(0).pixels
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
    pixels = open_source(f"folder:{tmp_path}", image_size=8).load(0).pixels
    assert pixels[:, :, 4:].unique().tolist() == [255]
    assert pixels[:, :, :4].unique().tolist() == [0]


def test_colour_becomes_grey_and_grey_becomes_colour_as_asked(tmp_path):
    save(tmp_path / "grey.png", np.full((5, 5), 77))
    assert open_source(f"folder:{tmp_path}", image_size=5).load(0).pixels.shape == (3, 5, 5)
    grey = open_source(f"folder:{tmp_path}", image_size=5, image_channels=1).load(0).pixels
    assert (grey.shape, grey.unique().tolist()) == ((1, 5, 5), [77])
    assert fit_image(Image.fromarray(solid(4, 4, (255, 0, 0))), 4, 1).unique().tolist() == [76]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_source(f"folder:{tmp_path}", image_size=4).load(0).pixels.unique().tolist() == [128]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_is_refused_by_path(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    source = open_source(f"folder:{tmp_path}", image_size=4)
    with pytest.raises(UserError, match=r"bad\.png is not an image that can be read"):
        source.load(0)


def test_a_truncated_jpeg_is_refused_by_path(tmp_path):
    path = save(tmp_path / "cut.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg is not an image"):
        open_source(f"folder:{tmp_path}", image_size=4).load(0)


def test_a_file_that_vanished_is_a_fault_of_the_world(tmp_path):
    source = folder_of(tmp_path, {"a.png": (0, 0, 0)})
    (tmp_path / "a.png").unlink()
    with pytest.raises(WorldError, match=r"cannot read .*a\.png"):
        source.load(0)


def test_sources_survive_pickling(tmp_path):
    for source in (open_source("digits"), folder_of(tmp_path, {"x/a.png": (9, 9, 9)})):
        copy = pickle.loads(pickle.dumps(source))
        assert copy == source
        assert torch.equal(copy.load(0).pixels, source.load(0).pixels)


def test_the_inventory_changes_with_names_and_sizes_of_files(tmp_path):
    before = folder_of(tmp_path, {"a.png": (0, 0, 0)}).inventory()
    assert folder_of(tmp_path, {}).inventory() == before
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (6, 6, 3)))
    resized = folder_of(tmp_path, {}).inventory()
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({before, resized, folder_of(tmp_path, {}).inventory()}) == 3


def test_an_s3_folder_is_listed_and_read_through_storage(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", solid(4, 4, (1, 2, 3)))
    listing = ["s3://bucket/pets/cat/a.png", "s3://bucket/pets/cat/notes.txt"]
    monkeypatch.setattr(storage, "list_files", lambda location: iter(listing if location == "s3://bucket/pets" else []))
    monkeypatch.setattr(storage, "read_bytes", {listing[0]: path.read_bytes()}.__getitem__)
    source = open_source("folder:s3://bucket/pets/", image_size=4)
    assert (source.name, source.class_names) == ("folder:s3://bucket/pets", ("cat",))
    assert source.load(0).pixels[:, 0, 0].tolist() == [1, 2, 3]
