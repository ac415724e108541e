"""Manifests and indexes: what a data set is, refused when it is not that."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))

from data_sets import write_data_set

from pipeline.data.faults import DataError
from pipeline.data.manifest import Manifest, ShardIndex, ShardInfo, load_manifest, shard_location
from pipeline.data.shards import read_index
from pipeline.errors import UserError

SHARD = ShardInfo(
    name="shard-000000.tar",
    index="index/000000.json",
    num_images=5,
    num_bytes=10240,
    sha256="a" * 64,
    index_sha256="b" * 64,
)


def manifest_of(*infos, **fields):
    defaults = {"source": "test", "source_fingerprint": "f", "image_size": 6, "image_channels": 3}
    counts = {"largest_image_bytes": 100, "num_images": sum(info.num_images for info in infos)}
    return Manifest(**{**defaults, **counts, "class_names": ("a", "b", "c"), "shards": tuple(infos), **fields})


INDEX = ShardIndex(
    keys=("000", "a/b c", "é\n"),
    offsets=np.array([512, 2048, 2**40]),
    sizes=np.array([100, 7, 2**33]),
    sha256_heads=np.array([0, 1, 2**64 - 1], dtype=np.uint64),
    labels=np.array([0, -1, 7]),
    num_bytes=2**41,
    sha256="c" * 64,
    kinds=(("jpeg", 4, 5, 3), ("png", 4, 4, 0)),
)


def test_a_manifest_survives_json():
    manifest = manifest_of(SHARD, replace(SHARD, name="s3://bucket/x.tar"), fit="pad", image_format="mixed")
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.shard_sizes == (5, 5)
    assert manifest.image_shape == (6, 6, 3)


def test_a_manifest_has_a_line_for_each_shard():
    lines = manifest_of(SHARD, replace(SHARD, name="other.tar")).to_json().splitlines()
    assert [json.loads(line.strip().rstrip(","))["name"] for line in lines if ".tar" in line] == [
        "shard-000000.tar",
        "other.tar",
    ]


def test_the_digest_knows_content_and_not_origin():
    manifest = manifest_of(SHARD)
    same = [
        manifest_of(SHARD, source="elsewhere", source_fingerprint="g"),
        manifest_of(replace(SHARD, name="/elsewhere/x.tar", index="index/000007.json")),
    ]
    assert {each.digest for each in same} == {manifest.digest}
    changed = [
        manifest_of(SHARD, image_size=7),
        manifest_of(SHARD, image_channels=1),
        manifest_of(SHARD, class_names=("a", "b", "d")),
        manifest_of(SHARD, fit="center"),
        manifest_of(replace(SHARD, sha256="0" * 64)),
        manifest_of(replace(SHARD, index_sha256="0" * 64)),
    ]
    assert len({manifest.digest, *(each.digest for each in changed)}) == 1 + len(changed)


def test_the_digest_changes_when_one_label_changes():
    other = replace(INDEX, labels=np.array([0, -1, 6]))
    digests = [manifest_of(index.describe("x.tar", "index/000000.json")).digest for index in (INDEX, other)]
    assert digests[0] != digests[1]


def test_shards_lie_in_the_folder_or_where_their_name_says():
    assert shard_location("/data/set", "shard-000000.tar") == "/data/set/shard-000000.tar"
    assert shard_location("/data/set", "/elsewhere/x.tar") == "/elsewhere/x.tar"
    assert shard_location("s3://bucket/set", "x.tar") == "s3://bucket/set/x.tar"
    assert shard_location("/data/set", "s3://bucket/x.tar") == "s3://bucket/x.tar"


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=rf"{folder} holds no data set"):
            load_manifest(str(folder))


def test_shards_without_a_manifest_are_called_half_written(tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"half-written .* run jobs/prepare_data\.py again"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "not a readable manifest"),
        (lambda text: "[]", "not a readable manifest"),
        (lambda text: text.replace('"image_size"', '"size"'), "not a readable manifest"),
        (lambda text: text.replace('"num_bytes"', '"size"'), "not a readable manifest"),
        (lambda text: text.replace('"index_sha256"', '"index_sum"'), "a shard's entry is incomplete"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "format version 1 .*prepare"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 99'), "format version 99"),
        (lambda text: text.replace('"num_images": 5,\n  "shards"', '"num_images": 6,\n  "shards"'), "hold 5"),
        (lambda text: text.replace('"num_images": 5', '"num_images": 0'), "num_images is 0 but its shards hold 0"),
        (lambda text: json.dumps({**json.loads(text), "shards": [], "num_images": 0}), "hold 0"),
    ],
)
def test_an_unreadable_manifest_is_refused_by_location(tmp_path, change, message):
    text = manifest_of(SHARD).to_json()
    assert change(text) != text
    (tmp_path / "manifest.json").write_text(change(text))
    with pytest.raises(UserError, match=rf"{tmp_path}/manifest\.json: .*{message}"):
        load_manifest(str(tmp_path))


def test_an_index_survives_json():
    again = ShardIndex.from_json(INDEX.to_json())
    assert again.to_json() == INDEX.to_json()
    assert (again.keys, again.kinds, again.num_bytes, again.sha256) == (
        INDEX.keys,
        INDEX.kinds,
        INDEX.num_bytes,
        INDEX.sha256,
    )
    for name in ("offsets", "sizes", "sha256_heads", "labels"):
        assert np.array_equal(getattr(again, name), getattr(INDEX, name))
        assert getattr(again, name).dtype == getattr(INDEX, name).dtype


def test_an_index_describes_its_shard():
    info = INDEX.describe("x.tar", "index/000000.json")
    assert (info.name, info.index, info.num_images, info.num_bytes) == ("x.tar", "index/000000.json", 3, 2**41)


@pytest.mark.parametrize("column", ["keys", "offsets", "sizes", "sha256_heads", "labels"])
def test_an_index_whose_columns_differ_in_length_is_refused(column):
    record = json.loads(INDEX.to_json())
    record[column] = record[column][:-1]
    with pytest.raises(ValueError, match="its columns differ in length"):
        ShardIndex.from_json(json.dumps(record).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        INDEX.to_json()[:-40],
        INDEX.to_json().replace(b'"offsets": [512', b'"offsets": [1.5e300'),
        INDEX.to_json().replace(b'"ffffffffffffffff"', b'"1ffffffffffffffff"'),
        INDEX.to_json().replace(b'["jpeg",4,5,3]', b'["jpeg",4,5]'),
    ],
)
def test_what_is_no_index_is_refused(data):
    with pytest.raises(ValueError, match="not a shard index"):
        ShardIndex.from_json(data)


def test_a_missing_index_is_named_with_its_shard(tmp_path):
    data_set = write_data_set(tmp_path)
    (tmp_path / "index" / "000001.json").unlink()
    with pytest.raises(DataError, match=r"^shard shard-000001\.tar: its index .*/index/000001\.json is missing"):
        read_index(data_set.location, data_set.manifest, 1)


def test_an_altered_index_is_named_with_its_shard(tmp_path):
    data_set = write_data_set(tmp_path)
    path = tmp_path / "index" / "000001.json"
    record = json.loads(path.read_bytes())
    record["labels"][0] += 1
    path.write_bytes(json.dumps(record).encode())
    expected = data_set.manifest.shards[1].index_sha256
    with pytest.raises(DataError, match=rf"^shard shard-000001\.tar: its index .* was altered: .*sha256 {expected}"):
        read_index(data_set.location, data_set.manifest, 1)


def test_an_index_of_another_number_of_images_than_the_manifest_says_is_named_with_its_shard(tmp_path):
    data_set = write_data_set(tmp_path)
    shards = list(data_set.manifest.shards)
    shards[1] = replace(shards[1], num_images=shards[1].num_images + 1)
    manifest = replace(data_set.manifest, shards=tuple(shards), num_images=data_set.manifest.num_images + 1)
    with pytest.raises(DataError, match=r"shard-000001\.tar: its index lists 7 images, the manifest 8"):
        read_index(data_set.location, manifest, 1)
