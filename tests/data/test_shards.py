"""Shards: reproducible, readable by stock WebDataset, indexed without being trusted."""

import bz2
import gzip
import io
import lzma
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from data_sets import flip_a_byte, huge_png, picture, random_samples, tar_of, write_data_set

from pipeline.data.faults import DataError
from pipeline.data.shards import encode_shard, index_shard, read_images
from pipeline.data.sources import open_source
from pipeline.errors import UserError, WorldError
from pipeline.storage import sha256_hex


def index_of(data, name="x.tar"):
    return index_shard(name, io.BytesIO(data))


@pytest.fixture
def data_set(tmp_path):
    return write_data_set(tmp_path, (5,))


def test_images_and_labels_come_back_in_order(data_set):
    index = data_set.index(0)
    samples = list(data_set.samples.values())
    assert index.keys == tuple(sample.key for sample in samples)
    assert index.labels.tolist() == [sample.label for sample in samples]
    assert index.kinds == (("png", 4, 4, 3),)
    images = read_images(data_set.location, data_set.manifest, 0)
    assert torch.equal(images, torch.stack([sample.pixels for sample in samples]))
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_an_index_says_where_the_bytes_of_each_image_lie(image_format):
    data = encode_shard(random_samples(5), image_format)
    index = index_of(data)
    extension = {"png": "png", "jpeg": "jpg", "webp": "webp"}[image_format]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [tar.extractfile(f"{key}.{extension}").read() for key in index.keys]
    places = zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    assert [data[offset : offset + size] for offset, size in places] == files
    assert [f"{head:016x}" for head in index.sha256_heads.tolist()] == [sha256_hex(file)[:16] for file in files]
    assert (index.num_bytes, index.sha256) == (len(data), sha256_hex(data))


def test_the_same_samples_give_the_same_bytes_in_another_process():
    program = (
        "from pipeline.data.shards import encode_shard; from pipeline.data.sources import open_source\n"
        "from pipeline.storage import sha256_hex\n"
        "source = open_source('digits'); print(sha256_hex(encode_shard(source.samples(0, source.read(0, 20)))))"
    )
    source = open_source("digits")
    here = sha256_hex(encode_shard(source.samples(0, source.read(0, 20))))
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_members_carry_no_clock_no_user_and_no_extra_headers():
    with tarfile.open(fileobj=io.BytesIO(encode_shard(random_samples(5)))) as tar:
        members = tar.getmembers()
    assert len(members) == 10
    assert {(m.mtime, m.uname, m.gname, m.uid, m.gid, m.mode) for m in members} == {(0, "ddpm", "ddpm", 0, 0, 0o444)}
    assert {tuple(m.pax_headers) for m in members} == {()}


@pytest.mark.parametrize(("image_format", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_stock_webdataset_reads_our_shards(tmp_path, image_format, extension):
    data_set = write_data_set(tmp_path, (5,), image_format=image_format)
    dataset = webdataset.WebDataset(str(data_set.path(0)), shardshuffle=False).decode("pil")
    found = [(each["__key__"], each["cls"], np.asarray(each[extension])) for each in dataset]
    samples = data_set.samples.values()
    assert [(key, label) for key, label, _ in found] == [(each.key, each.label) for each in samples]
    ours = read_images(data_set.location, data_set.manifest, 0).numpy()
    for (_, _, array), image in zip(found, ours, strict=True):
        assert np.abs(array.transpose(2, 0, 1).astype(int) - image).max() <= (0 if image_format == "png" else 3)


def test_lossy_formats_keep_pixels_close():
    smooth = [replace(each, pixels=each.pixels // 16 + 100) for each in random_samples(3, size=16)]
    for image_format in ("jpeg", "webp"):
        index = index_of(data := encode_shard(smooth, image_format, quality=95))
        for offset, size, sample in zip(index.offsets.tolist(), index.sizes.tolist(), smooth, strict=True):
            array = np.asarray(Image.open(io.BytesIO(data[offset : offset + size])).convert("RGB"))
            assert np.abs(array.transpose(2, 0, 1).astype(int) - sample.pixels.numpy()).mean() < 6


def test_images_without_labels_have_no_cls_member():
    data = encode_shard(random_samples(5, labelled=False))
    assert index_of(data).labels.tolist() == [-1] * 5
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png"}


def test_a_missing_shard_is_named(data_set):
    data_set.path(0).unlink()
    expected = data_set.manifest.shards[0].num_bytes
    with pytest.raises(DataError, match=rf"shard-000000\.tar: it is missing.*{expected} bytes"):
        read_images(data_set.location, data_set.manifest, 0)


def test_a_truncated_shard_is_named_with_both_lengths(data_set):
    path = data_set.path(0)
    path.write_bytes(path.read_bytes()[:1024])
    expected = data_set.manifest.shards[0].num_bytes
    with pytest.raises(DataError, match=rf"shard-000000\.tar: .*expected {expected} bytes, found 1024"):
        read_images(data_set.location, data_set.manifest, 0)


def test_one_flipped_byte_is_noticed_and_the_shard_named(data_set):
    flip_a_byte(data_set.path(0), 700)
    expected = data_set.manifest.shards[0].sha256
    with pytest.raises(DataError, match=rf"shard-000000\.tar: it was altered: expected sha256 {expected}, found "):
        read_images(data_set.location, data_set.manifest, 0)


def test_an_undecodable_image_is_named_with_key_and_offset(tmp_path):
    data_set = write_data_set(tmp_path, (3,), files={(0, 1): b"no image"})
    key, offset = data_set.place(0, 1)
    with pytest.raises(DataError, match=rf"^shard shard-000000\.tar, image {key} at byte {offset}: not a PNG, JPEG"):
        read_images(data_set.location, data_set.manifest, 0)


@pytest.mark.parametrize("data", [b"x" * 2048, b"", b"\x80\x04pickle", b"\x1f\x8b" + b"x" * 2000])
def test_bytes_that_are_no_tar_are_refused_by_name(data):
    with pytest.raises(WorldError, match=r"shard-x\.tar is not a whole tar file"):
        index_of(data, "shard-x.tar")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_a_compressed_shard_is_refused(compress):
    with pytest.raises(WorldError, match=r"x\.tar is not a whole tar file"):
        index_of(compress(encode_shard(random_samples(3))))


def cut_points():
    """Where to cut a shard of three images, each with the words that must be said."""
    data = encode_shard(random_samples(3))
    index = index_of(data)
    second, size = int(index.offsets[1]), int(index.sizes[1])
    end = len(data.rstrip(b"\0")) + 511 & ~511
    return {
        "before the first header": 0,
        "in the first header": 100,
        "in a later header": second - 300,
        "right after a header": second,
        "in an image": second + size // 2,
        "in the padding after an image": second + size + 1,
        "before the end marker": end,
        "in the end marker": end + 100,
    }


@pytest.mark.parametrize("cut", cut_points().values(), ids=cut_points().keys())
def test_a_truncated_tar_is_refused_wherever_it_was_cut(cut):
    with pytest.raises(WorldError, match=r"shard x\.tar is not a whole tar file: \S+"):
        index_of(encode_shard(random_samples(3))[:cut])


def test_a_tar_that_lacks_only_padding_behind_the_end_marker_is_whole():
    data = encode_shard(random_samples(3))
    end = len(data.rstrip(b"\0")) + 511 & ~511
    assert len(index_of(data[: end + 512]).keys) == 3


@pytest.mark.parametrize("member", [1, 2, 5])
def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(member):
    data = bytearray(encode_shard(random_samples(3)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[member].offset
    data[offset + 150] ^= 0xFF
    with pytest.raises(WorldError, match=rf"x\.tar is not a whole tar file: .*at byte {offset}"):
        index_of(bytes(data))


def test_duplicate_keys_are_refused_by_name():
    twins = [{"__key__": key, "png": picture("RGB", (4, 4), seed=i)} for i, key in enumerate(["a", "b", "a"])]
    with pytest.raises(UserError, match=r"shard x\.tar has two images of key a; keys must be unique"):
        index_of(tar_of(twins))


def test_neighbours_of_one_key_are_refused_as_well():
    twins = [{"__key__": "a", "png": picture("RGB", (4, 4), seed=i)} for i in range(2)]
    with pytest.raises(UserError, match=r"two images of key a"):
        index_of(tar_of(twins))


@pytest.mark.parametrize("label", [b"cat", b"", b"1.5", b"\xff"])
def test_a_label_that_is_no_whole_number_is_refused_with_its_key(label):
    with pytest.raises(UserError, match=r"shard x\.tar, sample a: its label is no whole number"):
        index_of(tar_of([{"__key__": "a", "png": picture("RGB", (4, 4)), "cls": label}]))


@pytest.mark.parametrize("member", ["cls", "json"])
@pytest.mark.parametrize("label", [1_000_000, 2**70, -2])
def test_a_number_that_can_be_no_class_is_refused_with_its_key(member, label):
    data = str(label).encode() if member == "cls" else b'{"label": %d}' % label
    with pytest.raises(UserError, match=rf"shard x\.tar, sample a: its label {label} is not in 0\.\.999999"):
        index_of(tar_of([{"__key__": "a", "png": picture("RGB", (4, 4)), member: data}]))


@pytest.mark.parametrize(
    ("record", "label"),
    [(b'{"label": 2}', 2), (b'{"cls": 1}', 1), (b'{"caption": "x"}', -1), (b'{"label": null}', -1), (b"[2]", -1)],
)
def test_labels_are_also_found_in_json(record, label):
    index = index_of(tar_of([{"__key__": "a", "png": picture("RGB", (4, 4)), "json": record}]))
    assert index.labels.tolist() == [label]


@pytest.mark.parametrize("record", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_none_is_refused_with_its_key(record):
    with pytest.raises(UserError, match=r"shard x\.tar, sample a: "):
        index_of(tar_of([{"__key__": "a", "png": picture("RGB", (4, 4)), "json": record}]))


def test_the_kinds_of_images_are_taken_from_their_headers():
    images = [picture("RGB", (5, 4)), picture("L", (4, 4)), picture("RGBA", (4, 4)), b"none", picture("RGB", (5, 4))]
    index = index_of(tar_of({"__key__": str(i), "png": image} for i, image in enumerate(images)))
    assert index.kinds == (("png", 4, 4, 0), ("png", 4, 4, 1), ("png", 4, 5, 3), ("unreadable", 0, 0, 0))


def test_an_image_that_claims_to_be_huge_is_indexed_without_being_decoded():
    assert index_of(tar_of([{"__key__": "a", "png": huge_png()}])).kinds == (("unreadable", 0, 0, 0),)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "npy"])
def test_a_pickle_beside_an_image_is_never_loaded(tmp_path, extension):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # it would work
    marker.unlink()
    folder = tmp_path / "set"
    data_set = write_data_set(folder, (3,))
    shard = tar_of({"__key__": f"{i}", "png": picture("RGB", (4, 4), seed=i), extension: bomb} for i in range(3))
    index = index_of(shard)
    assert index.keys == ("0", "1", "2")
    data_set.path(0).write_bytes(shard)
    (folder / "index" / "000000.json").write_bytes(index.to_json())
    manifest = replace(data_set.manifest, shards=(index.describe("shard-000000.tar", "index/000000.json"),))
    assert len(read_images(data_set.location, manifest, 0)) == 3
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../evil.png", "/abs/evil.png", "a/../../evil.png", "evil\n.png"])
def test_member_names_are_keys_and_never_paths(tmp_path, name, monkeypatch):
    (inside := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(inside)
    before = set(tmp_path.rglob("*"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(image := picture("RGB", (4, 4)))
        tar.addfile(member, io.BytesIO(image))
    data = buffer.getvalue()
    index = index_of(data)
    assert index.keys == (name.removesuffix(".png"),)
    assert data[index.offsets[0] :][: index.sizes[0]] == image
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/abs").exists()


def test_links_devices_and_folders_in_a_shard_are_passed_over():
    image = picture("RGB", (4, 4))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"bad{ord(kind)}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("good.png")
        member.size = len(image)
        tar.addfile(member, io.BytesIO(image))
    assert index_of(buffer.getvalue()).keys == ("good",)
