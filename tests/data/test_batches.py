"""The batch of a step: the right pixels, whatever the caches hold; damaged images are named."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.data import batches as batches_module
from pipeline.data.batches import BatchReader
from pipeline.data.order import StreamOrder
from pipeline.data.shards import Manifest, ShardInfo, encode_shard
from pipeline.data.sources import Sample
from pipeline.errors import UserError, WorldError
from pipeline.images import to_model_range

SIZES = (5, 7, 1, 11)


def write_data_set(folder, *, channels=3, labelled=True, seed=0):
    """Random images, so that every one is told apart from every other and from its mirror image."""
    rng = np.random.default_rng(seed)
    infos, pixels = [], {}
    for shard, size in enumerate(SIZES):
        values = torch.from_numpy(rng.integers(0, 256, (size, channels, 4, 4), dtype=np.uint8))
        samples = [Sample(f"{shard:03d}{i:06d}", values[i], (shard + i) % 3 if labelled else None) for i in range(size)]
        pixels.update({(shard, i): samples[i] for i in range(size)})
        data = encode_shard(samples)
        infos.append(ShardInfo.of(f"shard-{shard:06d}.tar", data, size))
        (folder / infos[-1].name).write_bytes(data)
    manifest = Manifest(
        source="random",
        source_fingerprint="0",
        image_size=4,
        image_channels=channels,
        class_names=("a", "b", "c") if labelled else (),
        num_images=sum(SIZES),
        shards=tuple(infos),
    )
    return str(folder), manifest, pixels


ORDER = StreamOrder(shard_sizes=SIZES, batch_size=8, num_streams=4, seed=11)


def reader(location, manifest, **options):
    defaults = {"rank": 0, "num_workers": 1, "random_flip": False, "cache_bytes": 2**20}
    return BatchReader(location, manifest, ORDER, **{**defaults, **options})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 2000, 2**20])
def test_a_batch_holds_the_images_of_the_order_whatever_the_caches_hold(tmp_path, channels, cache_bytes):
    location, manifest, samples = write_data_set(tmp_path, channels=channels)
    source = reader(location, manifest, cache_bytes=cache_bytes)
    for step in range(7):
        batch = source.read(step)
        expected = [samples[position] for position in ORDER.global_batch(step)]
        assert torch.equal(batch.x_0, to_model_range(torch.stack([each.pixels for each in expected])))
        assert batch.labels is not None
        assert batch.labels.tolist() == [each.label for each in expected]
        assert batch.keys == tuple(each.key for each in expected)
        assert (batch.step, batch.streams) == (step, (0, 1, 2, 3))
        assert (batch.x_0.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
        assert batch.x_0.shape == (8, channels, 4, 4)
        assert batch.x_0.min() >= -1
        assert batch.x_0.max() <= 1


def test_a_data_set_without_classes_gives_no_labels(tmp_path):
    location, manifest, _ = write_data_set(tmp_path, labelled=False)
    assert reader(location, manifest).read(0).labels is None


def test_flips_mirror_left_to_right_about_half_of_the_images_anew_at_every_step(tmp_path):
    location, manifest, _ = write_data_set(tmp_path)
    plain, flipping = reader(location, manifest), reader(location, manifest, random_flip=True)
    patterns = []
    for step in range(60):
        straight, flipped = plain.read(step).x_0, flipping.read(step).x_0
        mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(straight, flipped, strict=True)]
        unchanged = [torch.equal(b, a) for a, b in zip(straight, flipped, strict=True)]
        assert [not each for each in mirrored] == unchanged
        patterns.append(tuple(mirrored))
    assert 0.4 < np.mean(patterns) < 0.6
    assert len(set(patterns)) > 40


def test_flips_are_the_same_for_any_number_of_workers(tmp_path):
    location, manifest, _ = write_data_set(tmp_path)
    alone = reader(location, manifest, random_flip=True)
    for num_workers in (2, 4):
        workers = [
            reader(location, manifest, rank=rank, num_workers=num_workers, random_flip=True)
            for rank in range(num_workers)
        ]
        for step in range(5):
            together = torch.cat([worker.read(step).x_0 for worker in workers])
            assert torch.equal(together, alone.read(step).x_0)


def count_reads(monkeypatch):
    reads = []
    read_shard = batches_module.read_shard
    monkeypatch.setattr(
        batches_module, "read_shard", lambda location, info: reads.append(info.name) or read_shard(location, info)
    )
    return reads


def test_a_data_set_that_fits_is_read_and_decoded_once(tmp_path, monkeypatch):
    location, manifest, _ = write_data_set(tmp_path)
    reads, decoded = count_reads(monkeypatch), []
    decode = batches_module.decode_image
    monkeypatch.setattr(batches_module, "decode_image", lambda *a: decoded.append(a) or decode(*a))
    source = reader(location, manifest)
    for step in range(30):
        source.read(step)
    assert sorted(reads) == [info.name for info in manifest.shards]
    assert len(decoded) == sum(SIZES)


def test_without_any_budget_the_shards_of_the_present_batch_are_still_read_only_once(tmp_path, monkeypatch):
    location, manifest, _ = write_data_set(tmp_path)
    reads = count_reads(monkeypatch)
    source = reader(location, manifest, cache_bytes=0)
    for step in range(12):
        del reads[:]
        source.read(step)
        assert len(reads) == len(set(reads))
    del reads[:]
    source.read(12)
    source.read(12)
    assert len(reads) == len(set(reads))


def test_a_worker_count_that_does_not_divide_the_streams_is_refused(tmp_path):
    location, manifest, _ = write_data_set(tmp_path)
    with pytest.raises(UserError, match="--num-workers 3"):
        reader(location, manifest, num_workers=3)


def png(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return buffer.getvalue()


def deep_png():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (png("RGB", (5, 4)), r"expected \[C, H, W\] = \(3, 4, 4\), found \(3, 4, 5\)"),
        (png("L", (4, 4)), r"found \(1, 4, 4\)"),
        (png("RGBA", (4, 4)), r"found \(4, 4, 4\)"),
        (b"no image at all", "not a PNG image"),
        (png("RGB", (4, 4))[:40], "not a readable image"),
        (deep_png(), "16 bits a channel"),
    ],
    ids=["too wide", "grey", "with alpha", "no png", "cut", "16 bits"],
)
def test_an_image_that_is_not_what_the_manifest_says_is_named_with_its_shard(tmp_path, image, message):
    source = reader(*foreign_data_set(tmp_path, {"png": image, "cls": b"0"}))
    with pytest.raises(WorldError, match=rf"^shard shard-00000\d\.tar, image pic\d+: .*{message}"):
        source.read(0)


@pytest.mark.parametrize("label", [None, b"3", b"-1"])
def test_a_label_that_is_not_a_class_is_named_with_its_shard(tmp_path, label):
    image = {"png": png("RGB", (4, 4))}
    source = reader(*foreign_data_set(tmp_path, image if label is None else {**image, "cls": label}))
    with pytest.raises(WorldError, match=r"^shard shard-00000\d\.tar, image pic\d+: label .* is not in 0\.\.2"):
        source.read(0)


def foreign_data_set(folder, members):
    """A data set that somebody else's program wrote, with a manifest that agrees on everything but the images."""
    location, manifest, _ = write_data_set(folder)
    infos = []
    for info in manifest.shards:
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
            for number in range(info.num_images):
                writer.write({"__key__": f"pic{number}", **members})
        (folder / info.name).write_bytes(buffer.getvalue())
        infos.append(ShardInfo.of(info.name, buffer.getvalue(), info.num_images))
    return location, replace(manifest, shards=tuple(infos))
