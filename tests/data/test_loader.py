"""The loader: batches ahead of time, in order, the same for any number of workers, and work that ends."""

import gc
import signal
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from data_sets import SIZES, config_of, loader_of, order_of, picture, write_data_set

from pipeline.config import PrepareConfig
from pipeline.data import batches as batches_module
from pipeline.data.faults import DataError, TooMuchDamageError
from pipeline.data.order import StreamOrder
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.errors import UserError, WorldError


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    location = str(tmp_path_factory.mktemp("digits"))
    return prepare(open_source("digits"), PrepareConfig(images_per_shard=300), location)


@pytest.fixture
def order(data_set):
    return StreamOrder(shard_sizes=data_set.manifest.shard_sizes, batch_size=64, num_streams=4, seed=5)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    foreign_threads.clear()
    foreign_threads.update(loader_threads())
    yield
    gc.collect()
    wait_until(lambda: loader_threads() == [] and loader_processes() == [])


foreign_threads = set()
"""Of other tests; those of this one are compared with them."""


def loader_threads():
    threads = (thread for thread in threading.enumerate() if thread.name.startswith("data-"))
    return [thread for thread in threads if thread not in foreign_threads]


def loader_processes():
    """The helpers of multiprocessing live as long as this process; their children are the loader processes."""
    children = psutil.Process().children(recursive=True)
    helpers = [child for child in children if any("multiprocessing." in word for word in cmdline(child))]
    return [child for child in children if child.ppid() in {helper.pid for helper in helpers}]


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def loader(data_set, order, *, start_step=0, end_step=10, **knobs):
    knobs = {"batch_size": 64, "random_flip": True, **knobs}
    return loader_of(data_set, range(start_step, end_step), order=order, **knobs)


def pixels_of(batches):
    return torch.stack([batch.x_0 for batch in batches])


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


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
    with (
        loader(data_set, order) as batches,
        loader(data_set, order, loader_cache_bytes=0, prefetch_batches=1) as frugal,
    ):
        assert torch.equal(pixels_of(batches), pixels_of(frugal))


def test_what_else_is_to_be_done_is_done_ahead_of_time_in_the_background(data_set, order):
    config = config_of(batch_size=64)
    done = []

    def finish(batch):
        done.append((batch.step, threading.current_thread().name))
        return f"batch {batch.step}"

    batches = batches_with(data_set, order, config, finish)
    wait_until(lambda: len(done) == config.prefetch_batches)
    assert next(batches) == "batch 0"
    batches.close()
    assert {name for _, name in done} == {"data-loader"}


def batches_with(data_set, order, config, finish):
    from pipeline.data.loader import Loader

    return Loader(
        data_set.location,
        data_set.manifest,
        order,
        config,
        rank=0,
        num_workers=1,
        start_step=0,
        end_step=9,
        finish=finish,
    )


def test_no_more_than_prefetch_batches_are_prepared_ahead(data_set, order, monkeypatch):
    prepared = []
    read = batches_module.BatchReader.read
    monkeypatch.setattr(
        batches_module.BatchReader, "read", lambda self, step: prepared.append(step) or read(self, step)
    )
    with loader(data_set, order, prefetch_batches=3) as batches:
        wait_until(lambda: len(prepared) == 3)
        time.sleep(0.1)
        assert prepared == [0, 1, 2]
        next(batches)
        wait_until(lambda: len(prepared) == 4)


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


def test_a_damaged_shard_stops_the_loader_and_is_named(tmp_path):
    damaged = write_data_set(tmp_path)
    damaged.path(3).write_bytes(b"short")
    with (
        loader_of(damaged, range(100)) as batches,
        pytest.raises(DataError, match=r"shard-000003\.tar, image .*cut off"),
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
    wait_until(lambda: loader_threads() == [], seconds=1)
    assert next(batches, None) is None


def test_closing_does_not_wait_for_a_read_that_hangs(data_set, order, monkeypatch):
    release = threading.Event()
    read = batches_module.BatchReader.read
    monkeypatch.setattr(batches_module.BatchReader, "read", lambda self, step: release.wait(30) and read(self, step))
    batches = loader(data_set, order)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 3
    release.set()
    wait_until(lambda: loader_threads() == [])


def test_closing_wakes_a_consumer_that_waits_in_another_thread(data_set, order, monkeypatch):
    release = threading.Event()
    read = batches_module.BatchReader.read
    monkeypatch.setattr(batches_module.BatchReader, "read", lambda self, step: release.wait(30) and read(self, step))
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
    wait_until(lambda: loader_threads() == [], seconds=1)


def test_a_loader_that_cannot_be_made_leaves_no_thread(data_set, order):
    with pytest.raises(UserError, match="--num-workers 99"):
        loader(data_set, order, num_workers=99)


def same(batch, other):
    assert (batch.step, batch.keys, batch.streams, batch.bad) == (other.step, other.keys, other.streams, other.bad)
    assert torch.equal(batch.x_0, other.x_0)
    assert torch.equal(batch.labels, other.labels)


@pytest.mark.slow
@pytest.mark.parametrize("loader_workers", [1, 2])
def test_loader_processes_give_the_batches_of_the_thread(data_set, order, loader_workers):
    with loader(data_set, order) as batches, loader(data_set, order, loader_workers=loader_workers) as others:
        for batch, other in zip(batches, others, strict=True):
            same(batch, other)
            assert batch.x_0.stride() == other.x_0.stride()


@pytest.mark.slow
def test_more_loader_processes_than_images_of_a_rank_are_not_started(tmp_path):
    data_set = write_data_set(tmp_path)
    with (
        loader_of(data_set, range(5), rank=3, num_workers=4) as batches,
        loader_of(data_set, range(5), rank=3, num_workers=4, loader_workers=3) as others,
    ):
        first = next(others)
        assert len(loader_processes()) == 2  # a rank has 2 images of a batch
        same(next(batches), first)
        for batch, other in zip(batches, others, strict=True):
            same(batch, other)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["missing shard", "wrong image"])
def test_substitutes_are_the_same_for_1_2_and_4_ranks_with_and_without_a_loader_process(tmp_path, kind):
    if kind == "wrong image":
        data_set = write_data_set(tmp_path, files={(3, 5): picture("L", (4, 4)), (1, 0): b"garbage"})
    else:
        data_set = write_data_set(tmp_path)
        data_set.path(1).unlink()
    knobs = {"on_bad_data": "skip", "max_bad_fraction": 1.0, "random_flip": True}
    steps = range(2 * (sum(SIZES) // 8))
    with loader_of(data_set, steps, **knobs) as batches:
        alone = list(batches)
    assert sum(len(batch.bad) for batch in alone) > 1
    for num_workers in (1, 2, 4):
        for loader_workers in (0, 1):
            ranks = [
                loader_of(data_set, steps, rank=rank, num_workers=num_workers, loader_workers=loader_workers, **knobs)
                for rank in range(num_workers)
            ]
            for whole, *parts in zip(alone, *ranks, strict=True):
                assert sum((part.keys for part in parts), ()) == whole.keys
                assert sorted(sum((part.bad for part in parts), ())) == sorted(whole.bad)
                assert torch.equal(torch.cat([part.x_0 for part in parts]), whole.x_0)
                assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


@pytest.mark.slow
@pytest.mark.parametrize("loader_workers", [1, 2])
def test_a_loader_process_that_is_killed_is_an_error_within_seconds(data_set, order, loader_workers):
    batches = loader(data_set, order, end_step=10_000, loader_workers=loader_workers)
    next(batches)
    loader_processes()[-1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(
        WorldError, match=r"^a loader process died \(.*\); if memory ran out, give fewer --loader"
    ) as up:
        deque(batches, maxlen=0)
    assert time.monotonic() - started < 20
    assert "\n" not in str(up.value)


@pytest.mark.slow
def test_a_fault_met_in_a_loader_process_arrives_as_it_is(tmp_path):
    data_set = write_data_set(tmp_path)
    data_set.flip_a_byte(1, 3)
    faults = []
    for loader_workers in (0, 1, 2):
        with (
            loader_of(data_set, range(100), loader_workers=loader_workers) as batches,
            pytest.raises(DataError) as raised,
        ):
            list(batches)
        fault = raised.value
        faults.append((str(fault), fault.shard, fault.reason, fault.key, fault.offset))
        assert "\n" not in str(fault)
    assert len(set(faults)) == 1
    assert faults[0][3:] == data_set.place(1, 3)


@pytest.mark.slow
def test_too_much_damage_met_in_a_loader_process_arrives_as_it_is(tmp_path):
    data_set = write_data_set(tmp_path)
    data_set.path(3).unlink()
    knobs = {"on_bad_data": "skip", "max_bad_fraction": 0.1, "loader_workers": 1}
    with (
        loader_of(data_set, range(100), **knobs) as batches,
        pytest.raises(TooMuchDamageError, match=r"^3 of the 24 images"),
    ):
        list(batches)


@pytest.mark.slow
def test_a_user_s_mistake_noticed_in_a_loader_process_arrives_as_one_line(data_set, order):
    knobs = {"cache_dir": "/proc/no-folder", "loader_workers": 1}
    with loader(data_set, order, **knobs) as batches, pytest.raises(UserError) as raised:
        next(batches)
    assert str(raised.value).startswith("--cache-dir /proc/no-folder: ")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("num_taken", [0, 3])
def test_closing_early_ends_the_loader_processes(data_set, order, num_taken):
    batches = loader(data_set, order, end_step=10_000, loader_workers=2)
    for _ in range(num_taken):
        next(batches)
    batches.close()
    wait_until(lambda: loader_processes() == [] and loader_threads() == [], seconds=20)


@pytest.mark.slow
def test_the_loader_processes_end_with_the_last_step_and_with_an_error(tmp_path):
    data_set = write_data_set(tmp_path)
    batches = loader_of(data_set, range(3), loader_workers=1)
    assert len(list(batches)) == 3
    wait_until(lambda: loader_processes() == [])
    data_set.path(1).unlink()
    with loader_of(data_set, range(30), loader_workers=1) as batches, pytest.raises(DataError) as raised:
        list(batches)
    # Also while somebody still looks at the error.
    wait_until(lambda: loader_processes() == [])
    assert raised.value.shard


def test_an_order_made_for_other_numbers_is_a_programmer_s_mistake(data_set):
    config = config_of(batch_size=64)
    with pytest.raises(AssertionError):
        batches_with(data_set, order_of(data_set.manifest, config_of(batch_size=32)), config, lambda batch: batch)
