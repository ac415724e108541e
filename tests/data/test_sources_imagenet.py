"""Downsampled ImageNet: npz batches of planes, with labels that count from 1."""

import pickle

import numpy as np
import pytest

from pipeline.data.sources import open_source
from pipeline.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
LABELS = np.array([2, 1, 3, 3, 1, 2, 1])


def batches(folder, save=np.savez, **changes):
    """Three images in the first batch, four in the second."""
    for number, part in enumerate((slice(0, 3), slice(3, 7)), start=1):
        arrays = {"data": IMAGES[part].reshape(-1, 48), "labels": LABELS[part], "mean": np.zeros(48)}
        save(folder / f"train_data_batch_{number}.npz", **{**arrays, **changes})
    return f"imagenet:{folder}/train_data_batch_*.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (1, 3), (2, 5), (3, 4), (4, 7)])
def test_any_range_gives_its_pixels_and_labels_from_zero_on(tmp_path, save, start, stop):
    source = open_source(batches(tmp_path, save))
    assert (len(source), source.image_size, source.image_channels) == (7, 4, 3)
    assert source.class_names == ("0", "1", "2")
    samples = list(source.samples(start, source.read(start, stop)))
    assert [sample.key for sample in samples] == [f"{index:09d}" for index in range(start, stop)]
    assert [sample.label for sample in samples] == (LABELS[start:stop] - 1).tolist()
    assert np.array_equal(np.stack([sample.pixels.numpy() for sample in samples]), IMAGES[start:stop])


def test_only_compressed_batches_are_read_in_the_driver_and_copies_read_the_same(tmp_path):
    assert not open_source(batches(tmp_path)).reads_in_driver
    source = open_source(batches(tmp_path, np.savez_compressed))
    assert source.reads_in_driver
    source.read(1, 5)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(0, 7) == [image.tobytes() for image in IMAGES]


def test_a_folder_stands_for_its_batches(tmp_path):
    batches(tmp_path)
    source = open_source(f"imagenet:{tmp_path}", image_size=8, image_channels=1)
    assert len(source) == 7
    assert next(source.samples(0, source.read(0, 1))).pixels.shape == (1, 8, 8)


def test_the_inventory_changes_with_a_batch(tmp_path):
    before = open_source(batches(tmp_path)).inventory()
    assert open_source(batches(tmp_path)).inventory() == before
    np.savez(tmp_path / "train_data_batch_2.npz", data=255 - IMAGES[3:].reshape(-1, 48), labels=LABELS[3:])
    assert open_source(f"imagenet:{tmp_path}").inventory() != before


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES.reshape(-1, 48), "labels": LABELS}, r"images must be in one of: data"),
        ({"data": IMAGES.reshape(-1, 48)}, "has no labels; give the published batches, or npz:PATH"),
        ({"data": IMAGES.reshape(-1, 48), "labels": LABELS - 1}, "has a label 0, and they count from 1"),
        ({"data": IMAGES.reshape(-1, 48)[:, :47], "labels": LABELS}, r"holds uint8 of shape \[7, 47\]"),
        ({"data": IMAGES.reshape(-1, 48), "labels": np.array([None] * 7)}, r"labels\.npy in .* holds object"),
    ],
)
def test_other_arrays_are_refused_and_nothing_is_unpickled(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        open_source(f"imagenet:{tmp_path}/x.npz")


def test_batches_of_different_sizes_need_a_size(tmp_path):
    spec = batches(tmp_path)
    np.savez(tmp_path / "train_data_batch_3.npz", data=np.zeros((2, 192), np.uint8), labels=np.array([1, 1]))
    with pytest.raises(UserError, match="batches of 4 and 8 pixels; give files of one size, or --image-size"):
        open_source(spec)
    assert len(open_source(spec, image_size=4)) == 9


def test_no_batches_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no files at .*; give a \.npz file, a folder or a pattern"):
        open_source(f"imagenet:{tmp_path}")
