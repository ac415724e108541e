"""Shards and manifests: reproducible, readable by stock WebDataset, refused when damaged."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from pipeline.data.shards import (
    Manifest,
    ShardInfo,
    encode_shard,
    load_manifest,
    parse_shard,
    read_shard,
    shard_name,
)
from pipeline.data.sources import Sample, open_source
from pipeline.errors import UserError, WorldError
from pipeline.images import decode_image


def samples(count=5, channels=3, labelled=True):
    values = np.random.default_rng(0).integers(0, 256, (count, channels, 6, 6), dtype=np.uint8)
    return [Sample(f"{i:09d}", torch.from_numpy(values[i]), i % 3 if labelled else None) for i in range(count)]


def manifest_of(*infos, **fields):
    defaults = {"source": "test", "source_fingerprint": "f", "image_size": 6, "image_channels": 3}
    classes = {"class_names": ("a", "b", "c"), "num_images": sum(info.num_images for info in infos)}
    return Manifest(**{**defaults, **classes, "shards": tuple(infos), **fields})


@pytest.fixture
def shard(tmp_path):
    data = encode_shard(samples())
    (tmp_path / shard_name(0)).write_bytes(data)
    return ShardInfo.of(shard_name(0), data, 5)


def test_images_and_labels_come_back_in_order(tmp_path, shard):
    read = read_shard(str(tmp_path), shard)
    assert [(each.key, each.label) for each in read] == [(each.key, each.label) for each in samples()]
    for written, each in zip(samples(), read, strict=True):
        assert np.array_equal(decode_image(each.image, 3), written.pixels.numpy())


def test_the_same_samples_give_the_same_bytes_in_another_process():
    program = (
        "from pipeline.data.shards import encode_shard; from pipeline.data.sources import open_source\n"
        "from pipeline.storage import sha256_hex\n"
        "source = open_source('digits'); print(sha256_hex(encode_shard(source.load(i) for i in range(20))))"
    )
    source = open_source("digits")
    here = ShardInfo.of("x", encode_shard(source.load(i) for i in range(20)), 20).sha256
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_members_carry_no_clock_no_user_and_no_extra_headers():
    with tarfile.open(fileobj=io.BytesIO(encode_shard(samples()))) as tar:
        members = tar.getmembers()
    assert len(members) == 10
    assert {(m.mtime, m.uname, m.gname, m.uid, m.gid, m.mode) for m in members} == {(0, "ddpm", "ddpm", 0, 0, 0o444)}
    assert {tuple(m.pax_headers) for m in members} == {()}


def test_stock_webdataset_reads_our_shards(tmp_path, shard):
    dataset = webdataset.WebDataset(str(tmp_path / shard.name), shardshuffle=False).decode("pil")
    found = [(each["__key__"], each["cls"], np.asarray(each["png"])) for each in dataset]
    assert [(key, label) for key, label, _ in found] == [(each.key, each.label) for each in samples()]
    assert all(
        np.array_equal(array.transpose(2, 0, 1), each.pixels)
        for (_, _, array), each in zip(found, samples(), strict=True)
    )


def test_images_without_labels_have_no_cls_member():
    data = encode_shard(samples(labelled=False))
    assert [each.label for each in parse_shard("x", data)] == [None] * 5
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png"}


def test_a_missing_shard_is_named(tmp_path, shard):
    (tmp_path / shard.name).unlink()
    with pytest.raises(WorldError, match=rf"shard-000000\.tar is missing.*{shard.num_bytes} bytes"):
        read_shard(str(tmp_path), shard)


def test_a_truncated_shard_is_named_with_both_lengths(tmp_path, shard):
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(WorldError, match=rf"shard-000000\.tar .*expected {shard.num_bytes} bytes, found 1024"):
        read_shard(str(tmp_path), shard)


def test_one_flipped_bit_is_noticed_and_the_shard_named(tmp_path, shard):
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(WorldError, match=rf"shard-000000\.tar was altered: expected sha256 {shard.sha256}, found "):
        read_shard(str(tmp_path), shard)


def test_a_shard_with_another_number_of_images_than_the_manifest_says_is_named(tmp_path, shard):
    with pytest.raises(WorldError, match=r"shard-000000\.tar is miscounted: expected 6 images, found 5"):
        read_shard(str(tmp_path), replace(shard, num_images=6))


@pytest.mark.parametrize("data", [b"x" * 2048, b"", b"\x80\x04pickle"])
def test_bytes_that_are_no_tar_are_refused_by_name(data):
    with pytest.raises(WorldError, match="shard-x is not a tar file of labelled images"):
        parse_shard("shard-x", data)


def test_a_pickle_in_a_shard_is_never_executed(tmp_path):
    marker = tmp_path / "executed"
    bomb = f"cposix\nsystem\n(Vtouch {marker}\ntR.".encode()
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        writer.write({"__key__": "0", "png": b"image", "pyd": bomb, "pickle": bomb})
    assert [each.image for each in parse_shard("x", buffer.getvalue())] == [b"image"]
    assert not marker.exists()


def test_a_manifest_survives_json(shard):
    manifest = manifest_of(shard)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.shard_sizes == (5,)


def test_the_digest_knows_content_and_not_origin(shard):
    manifest = manifest_of(shard)
    assert manifest_of(shard, source="elsewhere", source_fingerprint="g").digest == manifest.digest
    changed = [
        manifest_of(shard, image_size=7),
        manifest_of(shard, image_channels=1),
        manifest_of(shard, class_names=("a", "b", "d")),
        manifest_of(replace(shard, sha256="0" * 64)),
    ]
    assert len({manifest.digest, *(each.digest for each in changed)}) == 5


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=rf"{folder} holds no data set"):
            load_manifest(str(folder))


def test_shards_without_a_manifest_are_called_half_written(tmp_path, shard):
    with pytest.raises(UserError, match=r"half-written .* run jobs/prepare_data\.py again"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "not a readable manifest"),
        (lambda text: "[]", "not a readable manifest"),
        (lambda text: text.replace('"image_size"', '"size"'), "not a readable manifest"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 99'), "format version 99"),
        (lambda text: text.replace('"num_images": 5,\n  "shards"', '"num_images": 6,\n  "shards"'), "hold 5"),
        (lambda text: json.dumps({**json.loads(text), "shards": [], "num_images": 0}), "hold 0"),
        (lambda text: text.replace('"png"', '"npy"'), "image format 'npy'"),
    ],
)
def test_an_unreadable_manifest_is_refused_by_location(tmp_path, shard, change, message):
    text = manifest_of(shard).to_json()
    assert change(text) != text
    (tmp_path / "manifest.json").write_text(change(text))
    with pytest.raises(UserError, match=rf"{tmp_path}/manifest\.json: .*{message}"):
        load_manifest(str(tmp_path))
