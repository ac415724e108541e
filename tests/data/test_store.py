"""The shard store: opens ahead of time, within its budget, keeps what is needed, and ends."""

import gc
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parent))

from data_sets import write_data_set

from pipeline.data.faults import DataError
from pipeline.data.store import INDEX_BYTES_PER_IMAGE, ShardStore

PER_SHARD = 2
COST = PER_SHARD * INDEX_BYTES_PER_IMAGE


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("set"), (PER_SHARD,) * 20)


@pytest.fixture
def stores(data_set):
    """Makes stores and closes them."""
    made = []

    def make(budget_shards, **options):
        options = {"access": "files", "cache": None, "patience_seconds": 0.0, **options}
        made.append(ShardStore(data_set.location, data_set.manifest, budget_bytes=budget_shards * COST, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def num_open():
    """How many shards are open as files."""

    def count():
        return sum("shard-" in file.path for file in psutil.Process().open_files())

    yield count
    gc.collect()


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def bytes_of(data_set, shard, image):
    index = data_set.index(shard)
    start = int(index.offsets[image])
    return data_set.path(shard).read_bytes()[start : start + int(index.sizes[image])]


def test_an_image_is_the_bytes_that_its_index_points_at(data_set, stores):
    store = stores(20)
    for shard in range(20):
        opened = store.shard(shard)
        for image in range(PER_SHARD):
            assert opened.read(image) == store.read(opened, (shard, image)) == bytes_of(data_set, shard, image)


def test_shards_needed_soon_are_opened_as_far_as_the_budget_goes(stores, num_open):
    store = stores(5)
    store.expect([3, 4], range(20))
    for shard in (3, 4, 0, 1, 2):
        assert store.has_all([shard])
    wait_until(lambda: num_open() == 5)
    assert not any(store.has_all([shard]) for shard in range(5, 20))


def test_what_is_needed_is_kept_even_above_the_budget(stores, num_open):
    store = stores(2)
    store.expect(range(10), range(20))
    assert store.has_all(range(10))
    assert not store.has_all([10])
    opened = [store.shard(shard) for shard in range(10)]
    assert num_open() == 10
    assert all(shard.read(0) for shard in opened)


def test_never_more_shards_are_open_than_the_budget_allows_while_the_need_moves_on(stores, num_open):
    store = stores(6)
    for first in range(15):
        needed = range(first, first + 3)
        store.expect(needed, range(first, min(first + 8, 20)))
        for shard in needed:
            assert store.shard(shard).read(0)
        wait_until(lambda: num_open() <= 6)
        assert store.has_all(needed)


def test_shards_that_are_needed_no_more_stay_open_while_there_is_room(stores, num_open):
    store = stores(20)
    store.expect([0, 1], [])
    store.expect([2, 3], [])
    assert store.has_all(range(4))
    store = stores(3)
    store.expect([0, 1], [])
    store.expect([2, 3], [])
    assert store.has_all([2, 3])
    assert not store.has_all([0, 1])


def test_the_bytes_of_whole_shards_count_where_they_are_held_in_memory(data_set, stores):
    largest = max(info.num_bytes for info in data_set.manifest.shards) + COST
    store = ShardStore(
        data_set.location,
        data_set.manifest,
        access="memory",
        cache=None,
        budget_bytes=4 * largest,
        patience_seconds=0.0,
    )
    store.expect([7], range(20))
    assert store.has_all([7, 0, 1, 2])
    assert not store.has_all([3])
    store.close()


def test_a_shard_that_nobody_expected_is_opened_when_it_is_asked_for(data_set, stores, num_open):
    store = stores(2)
    for shard in (9, 3, 9, 5, 7):
        assert store.shard(shard).read(1) == bytes_of(data_set, shard, 1)
    assert num_open() <= 2


def test_the_store_takes_no_more_files_than_its_limit(data_set, monkeypatch, num_open):
    monkeypatch.setattr("pipeline.data.store._MAX_OPEN_SHARDS", 4)
    store = ShardStore(
        data_set.location, data_set.manifest, access="files", cache=None, budget_bytes=10**9, patience_seconds=0.0
    )
    for first in range(0, 18):
        store.expect([first, first + 1], range(20))
        assert store.shard(first).read(0)
        assert store.shard(first + 1).read(0)
        wait_until(lambda: num_open() <= 4)
    store.close()


def test_an_image_aside_leaves_no_file_open(data_set, stores, num_open):
    store = stores(3)
    for shard in range(20):
        with store.aside(shard) as opened:
            assert opened.read(0) == bytes_of(data_set, shard, 0)
    assert num_open() == 0


def test_opening_a_missing_shard_is_told_to_each_who_asks(tmp_path, stores):
    data_set = write_data_set(tmp_path, (2, 2))
    data_set.path(1).unlink()
    store = ShardStore(
        data_set.location, data_set.manifest, access="files", cache=None, budget_bytes=10**6, patience_seconds=0.0
    )
    store.expect([0, 1], [])
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard-000001\.tar: it is missing"):
            store.shard(1)
    assert store.shard(0).read(0)
    store.close()


def test_single_images_are_fetched_ahead_of_time(data_set, stores):
    store = stores(20, access="ranges")
    store.expect([2, 3], [])
    store.expect_images([(2, 0), (3, 1), (9, 0)])
    shard = store.shard(3)
    assert store.read(shard, (3, 1)) == bytes_of(data_set, 3, 1)
    assert store.read(store.shard(2), (2, 0)) == bytes_of(data_set, 2, 0)
    assert store.read(store.shard(9), (9, 0)) == bytes_of(data_set, 9, 0)
    assert store.read(shard, (3, 0)) == bytes_of(data_set, 3, 0)


@pytest.fixture
def num_threads():
    """How many threads stores have, without those of other tests."""
    others = set(threading.enumerate())

    def count():
        gc.collect()
        return sum(thread.name.startswith("data-") for thread in set(threading.enumerate()) - others)

    return count


def test_threads_and_files_end_with_the_store(stores, num_open, num_threads):
    store = stores(20, access="ranges")
    store.expect(range(5), range(20))
    store.shard(0)
    assert num_threads() > 0
    assert num_open() > 0
    store.close()
    wait_until(lambda: num_threads() == num_open() == 0)


def test_threads_end_with_a_store_that_nobody_closed(data_set, num_threads):
    store = ShardStore(
        data_set.location, data_set.manifest, access="files", cache=None, budget_bytes=10**6, patience_seconds=0.0
    )
    store.expect(range(5), range(20))
    store.shard(0)
    del store
    wait_until(lambda: num_threads() == 0)


def test_closing_twice_does_no_harm(stores):
    store = stores(4)
    store.expect([0], [1])
    store.close()
    store.close()
