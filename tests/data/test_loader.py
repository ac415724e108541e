"""The loader: batches ahead of time, in order, the same for any number of workers, and a thread that ends."""

import gc
import threading
import time
import traceback

import pytest
import torch

from pipeline.data import batches as batches_module
from pipeline.data.loader import Loader
from pipeline.data.order import StreamOrder
from pipeline.data.prepare import prepare
from pipeline.errors import UserError, WorldError


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    location = str(tmp_path_factory.mktemp("digits"))
    return location, prepare("digits", location, images_per_shard=300).manifest


@pytest.fixture
def order(data_set):
    return StreamOrder(shard_sizes=data_set[1].shard_sizes, batch_size=64, num_streams=4, seed=5)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    assert loader_threads() == []


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data-loader"]


def loader(data_set, order, **options):
    defaults = {"rank": 0, "num_workers": 1, "random_flip": True, "start_step": 0, "end_step": 10}
    return Loader(*data_set, order, **{**defaults, **options})


def pixels_of(batches):
    return torch.stack([batch.x_0 for batch in batches])


def test_steps_come_in_order_and_end(data_set, order):
    with loader(data_set, order, start_step=3, end_step=9) as batches:
        assert [batch.step for batch in batches] == [3, 4, 5, 6, 7, 8]
        assert next(batches, None) is None


def test_no_steps_give_no_batches(data_set, order):
    with loader(data_set, order, start_step=4, end_step=4) as batches:
        assert list(batches) == []


def test_the_pixels_are_the_same_for_1_2_and_4_workers(data_set, order):
    with loader(data_set, order) as batches:
        alone = list(batches)
    for num_workers in (2, 4):
        ranks = []
        for rank in range(num_workers):
            with loader(data_set, order, rank=rank, num_workers=num_workers) as batches:
                ranks.append(list(batches))
        assert {len(rank) for rank in ranks} == {10}
        for step, whole in enumerate(alone):
            parts = [rank[step] for rank in ranks]
            assert torch.equal(torch.cat([part.x_0 for part in parts]), whole.x_0)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            assert sum((part.keys for part in parts), ()) == whole.keys
            assert sum((part.streams for part in parts), ()) == whole.streams == (0, 1, 2, 3)


def test_a_loader_that_starts_in_the_middle_of_a_later_epoch_goes_on_where_the_unbroken_one_would(data_set, order):
    start = order.batches_per_epoch + 5
    with loader(data_set, order, end_step=start + 6) as batches:
        unbroken = list(batches)[start:]
    with loader(data_set, order, start_step=start, end_step=start + 6) as batches:
        resumed = list(batches)
    assert torch.equal(pixels_of(resumed), pixels_of(unbroken))
    assert [batch.keys for batch in resumed] == [batch.keys for batch in unbroken]


def test_one_epoch_delivers_no_image_twice(data_set, order):
    with loader(data_set, order, end_step=order.batches_per_epoch) as batches:
        keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == order.images_per_epoch == 1797 - 1797 % 64


def test_tiny_caches_change_nothing(data_set, order):
    with loader(data_set, order) as batches, loader(data_set, order, cache_bytes=0, prefetch=1) as frugal:
        assert torch.equal(pixels_of(batches), pixels_of(frugal))


def test_no_more_than_prefetch_batches_are_prepared_ahead(data_set, order, monkeypatch):
    prepared = []
    read = batches_module.BatchReader.read
    monkeypatch.setattr(
        batches_module.BatchReader, "read", lambda self, step: prepared.append(step) or read(self, step)
    )
    with loader(data_set, order, prefetch=3) as batches:
        wait_until(lambda: len(prepared) == 3)
        time.sleep(0.1)
        assert prepared == [0, 1, 2]
        next(batches)
        wait_until(lambda: len(prepared) == 4)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_waiting_for_data_is_measured(data_set, order, monkeypatch):
    read = batches_module.BatchReader.read
    monkeypatch.setattr(batches_module.BatchReader, "read", lambda self, step: time.sleep(0.05) or read(self, step))
    with loader(data_set, order, end_step=4) as batches:
        assert batches.wait_seconds == 0
        list(batches)
        assert 0.15 < batches.wait_seconds < 5


def test_an_error_of_the_thread_reaches_the_consumer_with_its_traceback_after_the_good_batches(
    data_set, order, monkeypatch
):
    read = batches_module.BatchReader.read

    def failing_read(self, step):
        if step == 2:
            raise WorldError("the disk is on fire")
        return read(self, step)

    monkeypatch.setattr(batches_module.BatchReader, "read", failing_read)
    batches = loader(data_set, order)
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(WorldError, match="on fire") as raised:
        next(batches)
    assert "failing_read" in "".join(traceback.format_exception(raised.value))
    assert next(batches, None) is None


def test_a_damaged_shard_stops_the_loader_and_is_named(tmp_path, order):
    manifest = prepare("digits", str(tmp_path), images_per_shard=300).manifest
    (tmp_path / "shard-000003.tar").write_bytes(b"short")
    with (
        loader((str(tmp_path), manifest), order, end_step=100) as batches,
        pytest.raises(WorldError, match=r"shard-000003\.tar .*found 5"),
    ):
        list(batches)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_closing_early_ends_the_thread_at_once(data_set, order, num_taken):
    batches = loader(data_set, order, end_step=10_000)
    for _ in range(num_taken):
        next(batches)
    started = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - started < 1
    assert loader_threads() == []
    assert next(batches, None) is None


def test_closing_does_not_wait_for_a_read_that_hangs(data_set, order, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(batches_module.BatchReader, "read", lambda self, step: release.wait(30))
    batches = loader(data_set, order)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 3
    release.set()
    wait_until(lambda: loader_threads() == [])


def test_closing_wakes_a_consumer_that_waits_in_another_thread(data_set, order, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(batches_module.BatchReader, "read", lambda self, step: release.wait(30))
    batches = loader(data_set, order)
    ended = []
    consumer = threading.Thread(target=lambda: ended.extend(batches) or ended.append("end"))
    consumer.start()
    time.sleep(0.05)
    batches.close()
    consumer.join(timeout=5)
    release.set()
    assert ended == ["end"]
    wait_until(lambda: loader_threads() == [])


def test_a_dropped_loader_ends_its_thread(data_set, order):
    batches = loader(data_set, order, end_step=10_000)
    next(batches)
    del batches
    gc.collect()
    assert loader_threads() == []


def test_a_loader_that_cannot_be_made_leaves_no_thread(data_set, order):
    with pytest.raises(UserError, match="--num-workers 3"):
        loader(data_set, order, num_workers=3)
