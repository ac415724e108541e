"""Holding out: two data sets without a common image."""

from pathlib import Path

import pytest

from pipeline.config import PrepareConfig
from pipeline.data.holdout import split
from pipeline.data.manifest import ShardIndex
from pipeline.data.prepare import prepare
from pipeline.data.session import prepare_data
from pipeline.data.sources import open_source
from pipeline.errors import UserError


def keys(location, manifest):
    indexes = [ShardIndex.from_json((Path(location) / shard.index).read_bytes()) for shard in manifest.shards]
    return [key for index in indexes for key in index.keys]


def test_the_two_data_sets_are_disjoint_complete_and_of_the_sizes_asked_for(tmp_path):
    outcome = prepare_data(PrepareConfig(data=str(tmp_path / "d"), holdout_fraction=0.1, images_per_shard=500))
    assert [result.location for result in outcome.results] == [str(tmp_path / "d"), str(tmp_path / "d-holdout")]
    rest, held_out = (keys(result.location, result.manifest) for result in outcome.results)
    assert len(held_out) == round(0.1 * 1797)
    assert sorted(rest + held_out) == [f"{number:09d}" for number in range(1797)]
    assert outcome.to_json()["holdout"]["num_images"] == len(held_out)


def test_an_image_keeps_its_pixels_and_label(tmp_path):
    source = open_source("digits")
    _, part = split(source, 0.01)
    expected = {sample.key: sample for sample in source.samples(0, source.read(0, len(source)))}
    found = list(part.samples(3, part.read(3, 9)))
    assert len(found) == 6
    for sample in found:
        assert sample.pixels.equal(expected[sample.key].pixels)
        assert sample.label == expected[sample.key].label


def test_the_split_is_the_same_every_time():
    first, second = (split(open_source("digits"), 0.25)[1].indices.tolist() for _ in range(2))
    assert first == second != list(range(len(first)))


def test_another_fraction_is_another_data_set(tmp_path):
    config = PrepareConfig()
    prepare(split(open_source("digits"), 0.1)[0], config, str(tmp_path))
    with pytest.raises(UserError, match="another data set"):
        prepare(split(open_source("digits"), 0.2)[0], config, str(tmp_path))


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_a_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(UserError, match="--holdout-fraction"):
        split(open_source("digits"), fraction)
