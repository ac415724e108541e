"""Verify finds every kind of damage and changes nothing."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from data_sets import write_data_set

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
