"""What an evaluation keeps while it grows: continued, it ends with the same bits; damaged, it begins anew."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.data.manifest import load_manifest
from pipeline.data.shards import read_images
from pipeline.data.verify import verify
from pipeline.errors import WorldError
from pipeline.evaluation.gathering import Accumulator, Chunk, Gathering, Moments
from pipeline.evaluation.saved_images import SavedImages
from pipeline.storage import home

DIM, SIZE = 6, 5


def chunk(number: int, size: int = SIZE) -> Chunk:
    """A chunk that is a function of its number."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Chunk(number=number, features=torch.randn(size, DIM, generator=generator), images=images)


def moments() -> Mapping[str, Accumulator]:
    return {"moments": Moments(DIM)}


def result(gathering: Gathering) -> bytes:
    """The statistics as bytes."""
    (found,) = gathering.accumulators.values()
    assert isinstance(found, Moments)
    return found.statistics.to_bytes()


@pytest.mark.parametrize("killed_after", [1, 3, 6])
def test_a_gathering_that_was_interrupted_goes_on_and_ends_with_the_same_bits(killed_after: int) -> None:
    whole = Gathering({"model": "whole"}, moments)
    for number in range(6):
        whole.add(chunk(number))
    for number in range(killed_after):
        first = Gathering({"model": "cut"}, moments)
        assert first.next_chunk == number
        first.add(chunk(number))
    again = Gathering({"model": "cut"}, moments)
    assert again.next_chunk == killed_after
    for number in range(again.next_chunk, 6):
        again.add(chunk(number))
    assert result(again) == result(whole)


def test_what_is_kept_belongs_to_one_model_and_protocol() -> None:
    Gathering({"model": "a", "protocol": "x"}, moments).add(chunk(0))
    assert Gathering({"model": "a", "protocol": "x"}, moments).next_chunk == 1
    assert Gathering({"model": "b", "protocol": "x"}, moments).next_chunk == 0
    assert Gathering({"model": "a", "protocol": "y"}, moments).next_chunk == 0


def test_what_is_discarded_is_gone_and_leaves_no_file() -> None:
    gathering = Gathering({"model": "a"}, moments)
    gathering.add(chunk(0))
    assert Path(gathering.location).is_file()
    gathering.discard()
    gathering.discard()
    assert list(Path(home(), "evaluations").iterdir()) == []
    assert Gathering({"model": "a"}, moments).next_chunk == 0


@pytest.mark.parametrize("harm", ["truncated", "changed", "text"])
def test_a_damaged_file_is_named_and_the_work_begins_anew(harm: str, caplog: pytest.LogCaptureFixture) -> None:
    gathering = Gathering({"model": "a"}, moments)
    gathering.add(chunk(0))
    file = Path(gathering.location)
    data = bytearray(file.read_bytes())
    if harm == "truncated":
        os.truncate(file, len(data) - 8)
    elif harm == "changed":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_text("something else")
    with caplog.at_level(logging.WARNING):
        again = Gathering({"model": "a"}, moments)
    assert again.next_chunk == 0
    assert "cannot be continued and is made anew" in caplog.text
    again.add(chunk(0))
    assert result(again) == result(gathering)


def test_what_was_kept_without_an_accumulator_that_is_wanted_now_begins_anew() -> None:
    Gathering({"model": "a"}, moments).add(chunk(0))

    def more() -> Mapping[str, Accumulator]:
        return {"moments": Moments(DIM), "others": Moments(DIM)}

    assert Gathering({"model": "a"}, more).next_chunk == 0


def test_features_that_are_not_finite_are_refused_and_change_nothing_that_is_kept() -> None:
    gathering = Gathering({"model": "a"}, moments)
    gathering.add(chunk(0))
    bad = chunk(1)
    bad.features[2, 3] = float("nan")
    with pytest.raises(WorldError, match="features of 1 of 5 images are not finite"):
        gathering.add(bad)
    assert Gathering({"model": "a"}, moments).next_chunk == 1


def saved(location: Path) -> SavedImages:
    return SavedImages(
        str(location),
        source="5 images of a test",
        identity="abc",
        class_names=("even", "odd"),
        labels_of=lambda chunk: torch.arange(len(chunk.features)) % 2,
    )


def test_saved_images_are_a_data_set_whenever_saving_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.saved_images._IMAGES_PER_SHARD", 7)
    for number in range(5):
        gathering = Gathering({"model": "a"}, lambda: {"saved": saved(tmp_path / "images")})
        gathering.add(chunk(number))
    images = gathering.accumulators["saved"]
    assert isinstance(images, SavedImages)
    images.finish()
    location = str(tmp_path / "images")
    manifest = load_manifest(location)
    assert (manifest.num_images, manifest.image_size, manifest.class_names) == (25, 8, ("even", "odd"))
    assert manifest.shard_sizes == (7, 7, 7, 4)
    pixels = torch.cat([read_images(location, manifest, number) for number in range(len(manifest.shards))])
    assert torch.equal(pixels, torch.cat([chunk(number).images for number in range(5)]))  # type: ignore[misc]
    assert verify(location).faults == ()


def test_saved_images_never_mix_with_another_data_set(tmp_path: Path) -> None:
    Gathering({"model": "a"}, lambda: {"saved": saved(tmp_path)}).add(chunk(0))
    with pytest.raises(Exception, match="holds the beginning of another data set"):
        SavedImages(str(tmp_path), source="others", identity="other", class_names=(), labels_of=None)
