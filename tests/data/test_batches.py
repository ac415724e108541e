"""The batch of a step: the right pixels, whatever the caches hold; what is damaged is named, or skipped and counted."""

import gc
import json
import re
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from data_sets import (
    SIZES,
    config_of,
    deep_png,
    flip_a_byte,
    huge_png,
    order_of,
    picture,
    read_batch,
    reader_of,
    tar_of,
    write_data_set,
    write_shard,
)

from pipeline.data import batches as batches_module
from pipeline.data import store as store_module
from pipeline.data.batches import BatchReader
from pipeline.data.faults import DataError, TooMuchDamageError
from pipeline.data.read_plan import plan_reading
from pipeline.errors import UserError, WorldError
from pipeline.images import to_model_range

ORDER_STEPS = sum(SIZES) // 8  # of an epoch


def global_batch(data_set, step, **knobs):
    return order_of(data_set.manifest, config_of(**knobs)).global_batch(step)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 2000, 2**20])
def test_a_batch_holds_the_images_of_the_order_whatever_the_caches_hold(tmp_path, channels, cache_bytes):
    data_set = write_data_set(tmp_path, channels=channels)
    reader = reader_of(data_set, loader_cache_bytes=cache_bytes)
    for step in range(7):
        batch = read_batch(reader, step)
        expected = [data_set.samples[position] for position in global_batch(data_set, step)]
        assert torch.equal(batch.x_0, to_model_range(torch.stack([each.pixels for each in expected])))
        assert batch.labels is not None
        assert batch.labels.tolist() == [each.label for each in expected]
        assert batch.keys == tuple(each.key for each in expected)
        assert (batch.step, batch.streams, batch.bad) == (step, (0, 1, 2, 3), ())
        assert (batch.x_0.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
        assert batch.x_0.shape == (8, channels, 4, 4)
        assert batch.x_0.min() >= -1
        assert batch.x_0.max() <= 1
    reader.close()


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_give_the_same_pixels_at_every_reading(tmp_path, image_format):
    data_set = write_data_set(tmp_path, image_format=image_format)
    cached, fresh = reader_of(data_set), reader_of(data_set, loader_cache_bytes=0)
    for step in range(2 * ORDER_STEPS):
        assert np.array_equal(cached.read(step).pixels, fresh.read(step).pixels)
    cached.close()
    fresh.close()


def test_a_data_set_without_classes_gives_no_labels(tmp_path):
    data_set = write_data_set(tmp_path, labelled=False)
    reader = reader_of(data_set)
    part = reader.read(0)
    reader.close()
    assert part.labels.tolist() == [-1] * 8
    assert batches_module.join(0, reader.streams, [part], labelled=False).labels is None


def test_flips_mirror_left_to_right_about_half_of_the_images_anew_at_every_step(tmp_path):
    data_set = write_data_set(tmp_path)
    plain, flipping = reader_of(data_set), reader_of(data_set, random_flip=True)
    patterns = []
    for step in range(60):
        straight, flipped = read_batch(plain, step).x_0, read_batch(flipping, step).x_0
        mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(straight, flipped, strict=True)]
        unchanged = [torch.equal(b, a) for a, b in zip(straight, flipped, strict=True)]
        assert [not each for each in mirrored] == unchanged
        patterns.append(tuple(mirrored))
    assert 0.4 < np.mean(patterns) < 0.6
    assert len(set(patterns)) > 40
    plain.close()
    flipping.close()


def test_flips_are_the_same_for_any_number_of_workers(tmp_path):
    data_set = write_data_set(tmp_path)
    alone = reader_of(data_set, random_flip=True)
    for num_workers in (2, 4):
        workers = [reader_of(data_set, rank=r, num_workers=num_workers, random_flip=True) for r in range(num_workers)]
        for step in range(5):
            together = np.concatenate([worker.read(step).pixels for worker in workers])
            assert np.array_equal(together, alone.read(step).pixels)
        for worker in workers:
            worker.close()
    alone.close()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_parts_of_a_batch_together_are_the_batch(tmp_path, count):
    data_set = write_data_set(tmp_path)
    config = config_of(random_flip=True)
    arguments = (data_set.location, data_set.manifest, order_of(data_set.manifest, config), config)
    whole = BatchReader(*arguments, rank=0, num_workers=1)
    readers = [BatchReader(*arguments, rank=0, num_workers=1, part=(number, count)) for number in range(count)]
    for step in range(2 * ORDER_STEPS):
        parts, expected = [reader.read(step) for reader in readers], whole.read(step)
        assert np.array_equal(np.concatenate([part.pixels for part in parts]), expected.pixels)
        assert np.array_equal(np.concatenate([part.labels for part in parts]), expected.labels)
        assert sum((part.keys for part in parts), ()) == expected.keys
    for reader in [whole, *readers]:
        reader.close()


def count_opened(monkeypatch):
    opened = []
    open_shard = store_module.ShardStore._open
    monkeypatch.setattr(
        store_module.ShardStore, "_open", lambda self, number, **how: opened.append(number) or open_shard(self, number)
    )
    return opened


def test_a_data_set_that_fits_is_read_and_decoded_once(tmp_path, monkeypatch):
    data_set = write_data_set(tmp_path)
    opened, decoded = count_opened(monkeypatch), []
    decode = batches_module.decode_sample
    monkeypatch.setattr(batches_module, "decode_sample", lambda *a: decoded.append(a) or decode(*a))
    reader = reader_of(data_set)
    for step in range(30):
        reader.read(step)
    assert sorted(opened) == [0, 1, 2, 3]
    assert len(decoded) == sum(SIZES)
    reader.close()


def test_without_any_budget_the_shards_of_the_present_batch_are_still_opened_only_once(tmp_path, monkeypatch):
    data_set = write_data_set(tmp_path)
    opened = count_opened(monkeypatch)
    reader = reader_of(data_set, loader_cache_bytes=0)
    for step in range(12):
        del opened[:]
        reader.read(step)
        assert len(opened) == len(set(opened))
    del opened[:]
    reader.read(12)
    reader.read(12)
    assert len(opened) == len(set(opened))
    reader.close()


def test_more_workers_than_streams_are_refused(tmp_path):
    with pytest.raises(UserError, match="--num-workers 5"):
        reader_of(write_data_set(tmp_path), num_workers=5)


def test_a_disk_cache_too_small_for_the_shards_of_a_batch_is_refused(tmp_path):
    manifest = write_data_set(tmp_path / "set").manifest
    largest = max(info.num_bytes for info in manifest.shards)
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=4 * largest - 1)
    with pytest.raises(UserError, match=rf"--cache-bytes {4 * largest - 1}: a worker reads 4 shards .* {4 * largest}"):
        plan_reading(config, manifest, "s3://bucket/set", num_workers=1)
    plan_reading(replace(config, cache_bytes=4 * largest), manifest, "s3://bucket/set", num_workers=1)


def test_the_plan_for_remote_shards_follows_from_the_memory_that_may_be_used(tmp_path):
    manifest = write_data_set(tmp_path / "set").manifest
    total = 4 * max(info.num_bytes for info in manifest.shards)

    def access(location, **knobs):
        return plan_reading(config_of(**knobs), manifest, location, num_workers=1).access

    assert access(str(tmp_path / "set"), loader_cache_bytes=0) == "files"
    assert access("s3://bucket/set", loader_cache_bytes=total) == "memory"
    assert access("s3://bucket/set", loader_cache_bytes=total - 1) == "ranges"
    assert access("s3://bucket/set", loader_cache_bytes=0, cache_dir=str(tmp_path)) == "files"


# Damage. Every kind is a file that is really damaged; DAMAGED is the shard (of 7 images) that it is done to.

DAMAGED = 1
ENDLESS = range(40)


def is_missing(data_set):
    data_set.path(DAMAGED).unlink()
    return "it is missing; the manifest expects"


def has_no_index(data_set):
    (Path(data_set.location) / "index" / f"{DAMAGED:06d}.json").unlink()
    return "its index .* is missing"


def has_an_altered_index(data_set):
    path = Path(data_set.location) / "index" / f"{DAMAGED:06d}.json"
    record = json.loads(path.read_bytes())
    record["labels"] = record["labels"][::-1]
    path.write_bytes(json.dumps(record).encode())
    return "its index .* was altered: the manifest expects sha256"


SHARD_DAMAGE = [is_missing, has_no_index, has_an_altered_index]


def is_truncated(data_set):
    data_set.truncate(DAMAGED, 4)
    return {4, 5, 6}, r"the shard is cut off: \d+ bytes expected there, \d+ found"


def is_empty(data_set):
    data_set.path(DAMAGED).write_bytes(b"")
    return set(range(7)), r"the shard is cut off: \d+ bytes expected there, 0 found"


def has_a_flipped_byte(data_set):
    data_set.flip_a_byte(DAMAGED, 3)
    return {3}, r"its bytes were altered: wrong sha256 \(expected [0-9a-f]{16}"


FILE_DAMAGE = [is_truncated, is_empty, has_a_flipped_byte]

WRONG_FILES = {
    "undecodable": (b"no image at all", "not a PNG, JPEG or WebP image"),
    "cut": (picture("RGB", (4, 4))[:40], "not a readable image"),
    "of another size": (picture("RGB", (5, 4)), r"expected 4x4x3 \(height, width, channels\), found 4x5x3 RGB"),
    "grey": (picture("L", (4, 4)), "expected 4x4x3 .*, found 4x4x1 L"),
    "with alpha": (picture("RGBA", (4, 4)), "expected 4x4x3 .*, found 4x4x4 RGBA"),
    "of 16 bits": (deep_png(), "expected 4x4x3 .*, found 4x4x1 I;16"),
    "claiming 60000x60000": (huge_png(), "60000"),
    "a grey jpeg": (picture("L", (4, 4), "JPEG"), "expected 4x4x3 .*, found 4x4x1 L"),
    "a gif": (picture("RGB", (4, 4), "GIF"), "not a PNG, JPEG or WebP image"),
}


def first_bad_slot(data_set, bad, **knobs):
    """(step, place) of the first damaged image in the order."""
    for step in ENDLESS:
        for slot, (shard, image) in enumerate(global_batch(data_set, step, **knobs)):
            if shard == DAMAGED and image in bad:
                return step, slot
    raise AssertionError


def read_until_fault(data_set, **knobs):
    """The number of good steps and the fault."""
    reader = reader_of(data_set, **knobs)
    try:
        for step in ENDLESS:
            reader.read(step)
    except DataError as fault:
        return step, fault
    finally:
        reader.close()
    raise AssertionError


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_a_shard_that_cannot_be_used_stops_reading_and_is_named(tmp_path, damage):
    data_set = write_data_set(tmp_path)
    message = damage(data_set)
    step, fault = read_until_fault(data_set)
    assert step == first_bad_slot(data_set, range(7))[0]
    assert re.match(rf"shard \S*shard-{DAMAGED:06d}\.tar: {message}", str(fault))
    assert "\n" not in str(fault)
    assert fault.key is None


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_damage_inside_a_shard_stops_reading_and_is_named_with_key_and_byte(tmp_path, damage):
    data_set = write_data_set(tmp_path)
    bad, message = damage(data_set)
    step, fault = read_until_fault(data_set)
    expected_step, slot = first_bad_slot(data_set, bad)
    key, offset = data_set.place(*global_batch(data_set, expected_step)[slot])
    assert step == expected_step
    assert (fault.key, fault.offset) == (key, offset)
    assert re.match(rf"shard \S*shard-{DAMAGED:06d}\.tar, image {key} at byte {offset}: {message}", str(fault))


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_an_image_that_is_not_what_the_manifest_says_is_named_with_shard_key_and_byte(tmp_path, kind):
    file, message = WRONG_FILES[kind]
    data_set = write_data_set(tmp_path, files={(DAMAGED, 3): file})
    key, offset = data_set.place(DAMAGED, 3)
    step, fault = read_until_fault(data_set)
    assert step == first_bad_slot(data_set, {3})[0]
    assert re.match(rf"shard \S*shard-{DAMAGED:06d}\.tar, image {key} at byte {offset}: .*{message}", str(fault))
    assert "\n" not in str(fault)


@pytest.mark.parametrize("label", [None, b"3", b"-1"])
def test_a_label_that_is_not_a_class_is_named_with_its_shard(tmp_path, label):
    data_set = write_data_set(tmp_path)
    image = {"__key__": "pic", "png": picture("RGB", (4, 4)), **({} if label is None else {"cls": label})}
    finished = write_shard(tmp_path, 2, tar_of([image]))
    shards = list(data_set.manifest.shards)
    shards[2] = finished.index.describe(finished.name, shards[2].index)
    broken = replace(data_set, manifest=replace(data_set.manifest, shards=tuple(shards)))
    _, fault = read_until_fault(broken)
    assert re.match(r"shard \S*shard-000002\.tar, image pic at byte \d+: label -?\d is not in 0\.\.2", str(fault))


def test_a_damaged_image_is_noticed_even_if_its_neighbours_were_good_for_epochs(tmp_path):
    data_set = write_data_set(tmp_path)
    reader = reader_of(data_set, loader_cache_bytes=0)
    for step in range(5 * ORDER_STEPS):
        reader.read(step)
    data_set.flip_a_byte(DAMAGED, 3)
    with pytest.raises(DataError, match="wrong sha256"):
        deque((reader.read(5 * ORDER_STEPS + step) for step in ENDLESS), maxlen=0)
    reader.close()


def damage_something(data_set_folder, kind):
    """A data set with damage of one kind, and the images that it makes unreadable."""
    if kind in WRONG_FILES:
        return write_data_set(data_set_folder, files={(DAMAGED, 3): WRONG_FILES[kind][0]}), {3}
    data_set = write_data_set(data_set_folder)
    for damage in SHARD_DAMAGE:
        if damage.__name__ == kind:
            damage(data_set)
            return data_set, set(range(7))
    (damage,) = (damage for damage in FILE_DAMAGE if damage.__name__ == kind)
    return data_set, damage(data_set)[0]


KINDS = [*(damage.__name__ for damage in [*SHARD_DAMAGE, *FILE_DAMAGE]), *WRONG_FILES]
SKIP = {"on_bad_data": "skip", "max_bad_fraction": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_goes_on_with_others_in_the_place_of_what_is_damaged_and_nowhere_else(tmp_path, kind):
    data_set, bad = damage_something(tmp_path, kind)
    reader = reader_of(data_set, **SKIP)
    num_bad = 0
    for step in range(2 * ORDER_STEPS):
        batch, positions = read_batch(reader, step), global_batch(data_set, step)
        pixels = {sample.key: sample.pixels for sample in data_set.samples.values()}
        labels = {sample.key: sample.label for sample in data_set.samples.values()}
        damaged = [(shard, image) for shard, image in positions if shard == DAMAGED and image in bad]
        num_bad += len(damaged)
        assert len(batch.bad) == len(damaged)
        assert all(f"shard-{DAMAGED:06d}.tar" in line for line in batch.bad)
        unreadable = {data_set.samples[DAMAGED, image].key for image in bad}
        for slot, (key, position) in enumerate(zip(batch.keys, positions, strict=True)):
            assert key not in unreadable
            assert position in damaged or key == data_set.samples[position].key
            assert torch.equal(batch.x_0[slot], to_model_range(pixels[key]))
            assert batch.labels[slot] == labels[key]
    assert num_bad
    reader.close()


@pytest.mark.parametrize("kind", ["is_missing", "is_truncated", "has_a_flipped_byte", "of another size"])
def test_substitutes_are_the_same_for_any_number_of_ranks(tmp_path, kind):
    data_set, _ = damage_something(tmp_path, kind)
    alone = reader_of(data_set, random_flip=True, **SKIP)
    expected = [read_batch(alone, step) for step in range(3 * ORDER_STEPS)]
    for num_workers in (2, 4):
        ranks = [
            reader_of(data_set, rank=rank, num_workers=num_workers, random_flip=True, **SKIP)
            for rank in range(num_workers)
        ]
        for step, whole in enumerate(expected):
            parts = [read_batch(rank, step) for rank in ranks]
            assert sum((part.keys for part in parts), ()) == whole.keys
            assert sorted(sum((part.bad for part in parts), ())) == sorted(whole.bad)
            assert torch.equal(torch.cat([part.x_0 for part in parts]), whole.x_0)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        for rank in ranks:
            rank.close()
    assert any(batch.bad for batch in expected)
    alone.close()


def test_two_damaged_images_of_one_batch_get_substitutes_of_their_own(tmp_path):
    data_set = write_data_set(tmp_path, (40, 40), files={(0, i): b"none" for i in range(40)})
    reader = reader_of(data_set, **SKIP)
    keys = [read_batch(reader, step).keys for step in range(10)]
    assert len({key for batch in keys for key in batch if key.startswith("001")}) > 30
    reader.close()


def test_more_damage_than_is_accepted_stops_reading_with_both_numbers(tmp_path):
    data_set, _ = damage_something(tmp_path, "is_missing")
    with pytest.raises(TooMuchDamageError, match=r"^3 of the 24 images of an epoch .* --max-bad-fraction 0\.1; repair"):
        read_epochs(data_set, 1, on_bad_data="skip", max_bad_fraction=0.1)
    read_epochs(data_set, 1, on_bad_data="skip", max_bad_fraction=7 / 24)


def test_damage_is_counted_anew_in_every_epoch(tmp_path):
    data_set, _ = damage_something(tmp_path, "has_a_flipped_byte")
    assert read_epochs(data_set, 6, on_bad_data="skip", max_bad_fraction=1 / 24) == 6


def read_epochs(data_set, count, **knobs):
    reader = reader_of(data_set, **knobs)
    try:
        return sum(len(reader.read(step).bad) for step in range(count * ORDER_STEPS))
    finally:
        reader.close()


def test_a_data_set_without_any_good_image_is_an_error_that_names_the_first_fault(tmp_path):
    data_set = write_data_set(tmp_path, (8,), files={(0, i): b"none" for i in range(8)})
    reader = reader_of(data_set, **SKIP)
    with pytest.raises(WorldError, match=r"no readable image found in 100 tries; the first fault: .*not a PNG"):
        reader.read(0)
    reader.close()


def test_skipped_images_are_logged_by_name(tmp_path, caplog):
    data_set, _ = damage_something(tmp_path, "has_a_flipped_byte")
    read_epochs(data_set, 1, **SKIP)
    key, offset = data_set.place(DAMAGED, 3)
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == 1
    assert f"image {key} at byte {offset}" in lines[0]


def test_substitutes_leave_no_open_file_behind(tmp_path):
    data_set = write_data_set(tmp_path, (2,) * 40, files={(s, 0): b"none" for s in range(40)})
    reader = reader_of(data_set, loader_cache_bytes=0, **SKIP)
    reader.read(0)
    gc.collect()
    before = psutil.Process().num_fds()
    assert sum(len(reader.read(step).bad) for step in range(1, 40)) > 100
    gc.collect()
    assert psutil.Process().num_fds() < before + 20
    reader.close()


def test_a_reader_can_be_closed_and_leaves_no_file_open(tmp_path):
    data_set = write_data_set(tmp_path)
    before = psutil.Process().num_fds()
    reader = reader_of(data_set)
    reader.read(0)
    reader.close()
    gc.collect()
    assert psutil.Process().num_fds() == before


def test_damage_outside_of_the_images_is_left_to_verify(tmp_path):
    data_set = write_data_set(tmp_path)
    _, offset = data_set.place(DAMAGED, 3)
    flip_a_byte(data_set.path(DAMAGED), offset - 300)
    assert read_epochs(data_set, 2) == 0
