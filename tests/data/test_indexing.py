"""Shards of others become a data set where they are: indexed without a change, read like ours, refused when damaged."""

import gzip
import io
import json
import os
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from data_sets import picture, random_samples, read_batch, reader_of, tar_of

from pipeline.config import PrepareConfig
from pipeline.data.indexing import index_existing
from pipeline.data.manifest import load_manifest
from pipeline.data.shards import encode_shard
from pipeline.data.sources import fit_image
from pipeline.errors import UserError, WorldError
from pipeline.images import to_model_range


def content(folder):
    """Bytes and times of all files."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def shard_writer(folder, images, *, maxcount=4, labels=None):
    """Shards as stock WebDataset writes them, with its default encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/part-%05d.tar", maxcount=maxcount, verbose=0) as writer:
        for number, image in enumerate(images):
            label = {} if labels is None else {"cls": labels[number]}
            writer.write({"__key__": f"sample{number:04d}", "png": image, **label})


def random_arrays(count, size=6):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def img2dataset(folder, shapes, *, failed=(), per_shard=5):
    """Shards by img2dataset's conventions: jpg, json and txt; of a download that failed only the json."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(shapes), per_shard)):
        members = []
        for number, shape in enumerate(shapes[start : start + per_shard]):
            key = f"{shard:05d}{number:04d}"
            record = {"caption": f"a thing {key}", "url": "http://x.invalid/a.jpg", "key": key, "status": "success"}
            if start + number in failed:
                record |= {"status": "failed_to_download", "error_message": "HTTP Error 404", "width": None}
                members.append({"__key__": key, "json": json.dumps(record).encode(), "txt": record["caption"].encode()})
                continue
            record |= {"width": shape[0], "height": shape[1], "sha256": "0" * 64, "exif": "{}"}
            members.append(
                {
                    "__key__": key,
                    "jpg": picture("RGB", shape, "JPEG", seed=start + number),
                    "json": json.dumps(record).encode(),
                    "txt": record["caption"].encode(),
                }
            )
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(members))
        (folder / f"{shard:05d}.parquet").write_bytes(b"no shard")
        (folder / f"{shard:05d}_stats.json").write_text("{}")


def index(pattern, destination, **options):
    return index_existing(str(pattern), PrepareConfig(source=f"webdataset:{pattern}", **options), str(destination))


def read_all(data_set, **knobs):
    """Images and labels by key, of one epoch without remainder."""
    knobs = {"batch_size": 1, "num_streams": 1, **knobs}
    with closing(reader_of(data_set, **knobs)) as reader:
        batches = [read_batch(reader, step) for step in range(data_set.manifest.num_images // knobs["batch_size"])]
    return {key: (x_0, int(label)) for b in batches for key, x_0, label in zip(b.keys, b.x_0, b.labels, strict=True)}


def test_shards_of_stock_webdataset_are_indexed_without_a_change_and_read(tmp_path):
    arrays, labels = random_arrays(10), [i % 4 for i in range(10)]
    shard_writer(tmp_path / "theirs", arrays, labels=labels)
    before = content(tmp_path / "theirs")
    result = index(f"{tmp_path}/theirs/part-*.tar", tmp_path / "ours")
    assert content(tmp_path / "theirs") == before
    manifest = load_manifest(result.location)
    assert manifest == result.manifest
    assert (manifest.shard_sizes, manifest.image_shape, manifest.fit) == ((4, 4, 2), (6, 6, 3), None)
    assert (manifest.class_names, manifest.image_format) == (("0", "1", "2", "3"), "png")
    assert [info.name for info in manifest.shards] == [f"{tmp_path}/theirs/part-{n:05d}.tar" for n in range(3)]
    found = read_all(result)
    assert found.keys() == {f"sample{i:04d}" for i in range(10)}
    for number, array in enumerate(arrays):
        x_0, label = found[f"sample{number:04d}"]
        assert torch.equal(x_0, to_model_range(torch.from_numpy(array).permute(2, 0, 1)))
        assert label == labels[number]


def test_only_indexes_and_a_manifest_are_written(tmp_path):
    shard_writer(tmp_path / "theirs", random_arrays(8))
    index(f"{tmp_path}/theirs/part-*.tar", tmp_path / "ours")
    written = {str(path.relative_to(tmp_path / "ours")) for path in content(tmp_path / "ours")}
    assert written == {"source.json", "manifest.json", "index/000000.json", "index/000001.json"}


def test_shards_by_img2dataset_s_conventions_are_indexed_without_a_change_and_fitted_when_read(tmp_path):
    shapes = [(8, 8), (20, 12), (9, 30), (8, 8), (16, 16), (40, 8), (7, 7), (8, 9)]
    img2dataset(tmp_path / "theirs", shapes, failed=(2, 5))
    before = content(tmp_path / "theirs")
    result = index(f"{tmp_path}/theirs/{{00000..00001}}.tar", tmp_path / "ours", image_size=8)
    assert content(tmp_path / "theirs") == before
    manifest = result.manifest
    assert (manifest.shard_sizes, manifest.image_shape, manifest.fit) == ((4, 2), (8, 8, 3), "center")
    assert (manifest.class_names, manifest.image_format) == ((), "jpeg")
    reader = reader_of(result, batch_size=6, num_streams=2)
    part = reader.read(0)
    reader.close()
    numbers = {f"{n // 5:05d}{n % 5:04d}": n for n in range(8) if n not in (2, 5)}
    assert sorted(part.keys) == sorted(numbers)
    for key, pixels in zip(part.keys, part.pixels, strict=True):
        with Image.open(io.BytesIO(picture("RGB", shapes[numbers[key]], "JPEG", seed=numbers[key]))) as image:
            expected = fit_image(image, 8, 3, "center")
        assert torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), expected)


@pytest.mark.parametrize("crop", ["center", "pad", "stretch"])
def test_the_crop_decides_how_images_are_fitted_when_read(tmp_path, crop):
    image = picture("RGB", (12, 6))
    (tmp_path / "a.tar").write_bytes(tar_of([{"__key__": "0", "png": image, "cls": b"0"}]))
    result = index(tmp_path / "a.tar", tmp_path / "ours", image_size=4, crop=crop)
    expected = fit_image(Image.open(io.BytesIO(image)), 4, 3, crop)
    assert result.manifest.fit == crop
    assert torch.equal(read_all(result)["0"][0], to_model_range(expected))


def test_images_that_differ_in_shape_need_a_size(tmp_path):
    img2dataset(tmp_path / "theirs", [(8, 8), (20, 12)])
    with pytest.raises(UserError, match=r"images have other shapes than one square \(8x8x3, 12x20x3\); give --image-s"):
        index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    assert not (tmp_path / "ours" / "manifest.json").exists()


def test_a_size_given_too_late_continues_with_the_indexes_that_are_there(tmp_path):
    img2dataset(tmp_path / "theirs", [(8, 8), (20, 12)])
    with pytest.raises(UserError, match="give --image-size"):
        index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    result = index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours", image_size=8)
    assert result.manifest.fit == "center"


def test_images_of_one_square_shape_are_read_as_they_are_also_when_their_size_is_given(tmp_path):
    shard_writer(tmp_path / "theirs", random_arrays(2))
    assert index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours", image_size=6).manifest.fit is None
    assert index(f"{tmp_path}/theirs/*.tar", tmp_path / "grey", image_channels=1).manifest.fit == "center"


def test_one_image_without_a_label_makes_a_data_set_without_classes(tmp_path):
    images = [{"__key__": str(i), "png": picture("RGB", (4, 4), seed=i), "cls": b"1"} for i in range(3)]
    del images[1]["cls"]
    (tmp_path / "a.tar").write_bytes(tar_of(images))
    assert index(tmp_path / "a.tar", tmp_path / "ours").manifest.class_names == ()


def test_a_shard_whose_downloads_all_failed_is_left_out(tmp_path):
    img2dataset(tmp_path / "theirs", [(8, 8)] * 10, failed=range(5))
    result = index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    assert [Path(info.name).name for info in result.manifest.shards] == ["00001.tar"]


def test_an_unreadable_image_is_indexed_and_met_when_it_is_read(tmp_path):
    images = [picture("RGB", (4, 4)), b"no image"]
    (tmp_path / "a.tar").write_bytes(tar_of({"__key__": str(i), "png": image} for i, image in enumerate(images)))
    result = index(tmp_path / "a.tar", tmp_path / "ours")
    assert (result.manifest.num_images, result.manifest.image_shape) == (2, (4, 4, 3))
    with pytest.raises(WorldError, match=r"a\.tar, image 1 at byte \d+: not a PNG, JPEG or WebP image"):
        read_all(result)


@pytest.mark.parametrize("images", [[], [b"none", b"none"]], ids=["no image", "none that can be read"])
def test_shards_without_images_are_refused(tmp_path, images):
    (tmp_path / "a.tar").write_bytes(
        tar_of([{"__key__": "t", "txt": b"x"}, *({"__key__": str(i), "png": each} for i, each in enumerate(images))])
    )
    with pytest.raises(UserError, match=r"webdataset:.*a\.tar: no"):
        index(tmp_path / "a.tar", tmp_path / "ours")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"webdataset:.*nothing-\*\.tar matches no file"):
        index(f"{tmp_path}/nothing-*.tar", tmp_path / "ours")


def test_a_shard_that_the_pattern_names_and_is_missing_is_named(tmp_path):
    shard_writer(tmp_path / "theirs", random_arrays(8))
    with pytest.raises(UserError, match=r"part-00002\.tar does not exist"):
        index(f"{tmp_path}/theirs/part-{{00000..00002}}.tar", tmp_path / "ours")


def damaged(kind):
    data = encode_shard(random_samples(3))
    if kind == "compressed":
        return gzip.compress(data)
    if kind == "truncated":
        return data[:3000]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[2].offset
    return data[: offset + 10] + b"\xff" * 50 + data[offset + 60 :]


@pytest.mark.parametrize("kind", ["compressed", "truncated", "damaged header"])
def test_a_shard_that_is_no_whole_tar_is_named_and_no_manifest_is_written(tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(encode_shard(random_samples(3)))
    (tmp_path / "1.tar").write_bytes(damaged(kind))
    with pytest.raises(WorldError, match=rf"shard {tmp_path}/1\.tar is not a whole tar file"):
        index(f"{tmp_path}/*.tar", tmp_path / "ours")
    assert not (tmp_path / "ours" / "manifest.json").exists()


def test_indexing_continues_after_the_shard_that_stopped_it(tmp_path):
    shard_writer(tmp_path / "theirs", random_arrays(12))
    last = tmp_path / "theirs" / "part-00002.tar"
    good = last.read_bytes()
    last.write_bytes(b"\xff" * len(good))
    with pytest.raises(WorldError, match=r"part-00002\.tar"):
        index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    first = content(tmp_path / "ours" / "index")
    last.write_bytes(good)
    result = index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    assert (result.num_written, result.num_skipped) == (1, 2)
    assert first.items() <= content(tmp_path / "ours" / "index").items()
    again = index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    assert (again.num_written, again.manifest) == (0, result.manifest)


def test_other_shards_are_another_data_set(tmp_path):
    shard_writer(tmp_path / "theirs", random_arrays(8))
    index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")
    shard_writer(tmp_path / "theirs", random_arrays(12))
    with pytest.raises(UserError, match=r"holds another data set .* choose another --data"):
        index(f"{tmp_path}/theirs/*.tar", tmp_path / "ours")


def test_two_shards_may_have_equal_keys_and_equal_images_are_counted(tmp_path):
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(encode_shard(random_samples(3)))
    result = index(f"{tmp_path}/*.tar", tmp_path / "ours")
    assert (result.manifest.num_images, result.manifest.num_duplicates) == (6, 3)


def test_a_relative_pattern_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    shard_writer(tmp_path / "theirs", random_arrays(4))
    monkeypatch.chdir(tmp_path)
    result = index("theirs/*.tar", tmp_path / "ours")
    monkeypatch.chdir("/")
    assert os.path.isabs(result.manifest.shards[0].name)
    with closing(reader_of(result, batch_size=4, num_streams=1)) as reader:
        assert len(reader.read(0).keys) == 4
