"""Verify finds every kind of damage and changes nothing."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from data_sets import deep_png, huge_png, picture, tar_of, write_data_set

from pipeline.config import PrepareConfig
from pipeline.data.indexing import index_existing
from pipeline.data.verify import verify
from pipeline.errors import UserError


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_whole_data_set_has_no_faults_and_is_left_as_it_is(tmp_path):
    data_set = write_data_set(tmp_path)
    before = files(data_set.location)
    result = verify(data_set.location)
    assert (result.faults, result.num_bad_images) == ((), 0)
    assert "whole: 24 images in 4 shards" in result.text()
    assert files(data_set.location) == before


def test_an_altered_image_is_named_with_key_and_offset_and_the_others_stay_good(tmp_path):
    data_set = write_data_set(tmp_path)
    data_set.flip_a_byte(1, 3)
    result = verify(data_set.location)
    key, offset = data_set.place(1, 3)
    assert result.num_bad_images == 1
    assert any("altered: expected sha256" in fault for fault in result.faults)
    assert any(f"image {key} at byte {offset}: its bytes were altered" in fault for fault in result.faults)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"no image", "not a PNG, JPEG or WebP image"),
        (picture("RGB", (5, 4)), "expected 4x4x3 .*, found 4x5x3 RGB"),
        (picture("L", (4, 4)), "expected 4x4x3 .*, found 4x4x1 L"),
        (deep_png(), "expected 4x4x3 .*, found 4x4x1 I;16"),
        (huge_png(), "60000"),
    ],
    ids=["garbage", "another size", "grey", "16 bits", "huge"],
)
def test_an_image_that_is_not_what_the_manifest_says_is_named_though_every_checksum_is_right(tmp_path, file, reason):
    data_set = write_data_set(tmp_path, files={(1, 2): file})
    result = verify(data_set.location)
    key, offset = data_set.place(1, 2)
    (fault,) = result.faults
    assert re.match(rf"shard .*shard-000001\.tar, image {key} at byte {offset}: .*{reason}", fault)
    assert result.num_bad_images == 1


def test_damage_is_found_and_nothing_is_changed(tmp_path):
    data_set = write_data_set(tmp_path, files={(0, 1): b"garbage"})
    data_set.truncate(3, 5)
    data_set.path(2).unlink()
    before = files(data_set.location)
    assert verify(data_set.location).num_bad_images == 1 + 6 + 1
    assert files(data_set.location) == before


def test_faults_come_in_the_order_of_the_shards_and_their_images(tmp_path):
    damaged = [(0, 4), (1, 0), (1, 6), (3, 10)]
    data_set = write_data_set(tmp_path, files=dict.fromkeys(damaged, b"garbage"))
    keys = [data_set.place(*position)[0] for position in damaged]
    assert [key in fault for key, fault in zip(keys, verify(data_set.location).faults, strict=True)] == [True] * 4


def test_shards_that_were_indexed_where_they_are_are_verified_there(tmp_path):
    images = [{"__key__": str(i), "jpg": picture("RGB", (9, 7 + i), "JPEG", seed=i)} for i in range(4)]
    path = tmp_path / "theirs.tar"
    path.write_bytes(tar_of(images))
    location = str(tmp_path / "ours")
    index_existing(str(path), PrepareConfig(image_size=4), location)
    assert verify(location).faults == ()
    os.truncate(path, 2000)
    assert all(str(path) in fault for fault in verify(location).faults)
    path.unlink()
    assert [fault for fault in verify(location).faults if "it is missing" in fault] == list(verify(location).faults)


def test_a_cut_off_shard_loses_what_lies_behind_the_cut(tmp_path):
    data_set = write_data_set(tmp_path)
    data_set.truncate(3, 6)
    result = verify(data_set.location)
    assert result.num_bad_images == 11 - 6
    assert "wrong length" in result.faults[0]
    assert sum("cut off" in fault for fault in result.faults) == 5


def test_a_missing_shard_and_a_damaged_index_cost_all_their_images(tmp_path):
    data_set = write_data_set(tmp_path)
    os.remove(data_set.path(0))
    index = Path(data_set.location) / data_set.manifest.shards[1].index
    index.write_bytes(index.read_bytes().replace(b"0", b"1", 1))
    result = verify(data_set.location)
    assert result.num_bad_images == 5 + 7
    assert ["missing" in result.faults[0], "index" in result.faults[1]] == [True, True]


def test_a_byte_between_images_is_noticed_though_no_image_is_lost(tmp_path):
    data_set = write_data_set(tmp_path)
    data = bytearray(data_set.path(2).read_bytes())
    data[-1] ^= 1
    data_set.path(2).write_bytes(data)
    result = verify(data_set.location)
    assert (result.num_bad_images, len(result.faults)) == (0, 1)


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        verify(str(tmp_path))
