"""The promise of the loader, for data sets, worlds and interruptions of any shape: every image once, in one order."""

import io
import os
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data.loader import Batch, Loader
from pipeline.data.manifest import Manifest, index_name, shard_name
from pipeline.data.order import StreamOrder, streams_of_rank
from pipeline.data.prepare import Finished, write_manifest
from pipeline.data.read_plan import plan_reading
from pipeline.data.shards import encode_shard, index_shard
from pipeline.data.sources import Sample

pytestmark = pytest.mark.timeout(240)


def write_data_set(folder: Path, sizes: tuple[int, ...]) -> Manifest:
    """Images of one pixel whose colour is their number; keys are the numbers, too."""
    finished, number = [], 0
    (folder / "index").mkdir(parents=True)
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            colour = torch.tensor([number >> 16 & 255, number >> 8 & 255, number & 255], dtype=torch.uint8)
            samples.append(Sample(f"{number:06d}", colour.reshape(3, 1, 1), None))
            number += 1
        data = encode_shard(samples)
        (folder / shard_name(shard)).write_bytes(data)
        index = index_shard(shard_name(shard), io.BytesIO(data))
        (folder / index_name(shard)).write_bytes(index.to_json())
        finished.append(Finished(shard, shard_name(shard), index, written=True))
    facts = {"source": "numbers", "source_fingerprint": "0", "image_size": 1, "image_channels": 3, "class_names": ()}
    return write_manifest(str(folder), finished, **facts)


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """A data set for each list of shard sizes, written once."""

    @cache
    def find(sizes: tuple[int, ...]) -> tuple[str, Manifest]:
        folder = tmp_path_factory.mktemp("numbers")
        return str(folder), write_data_set(folder, sizes)

    return find


def read(
    data_set: tuple[str, Manifest], config: DataConfig, steps: range, *, num_workers: int = 1, seed: int = 0
) -> list[list[str]]:
    """Keys of the global batches as the ranks deliver them together; checks that the pixels belong to the keys."""
    location, manifest = data_set
    order = StreamOrder(
        shard_sizes=manifest.shard_sizes, batch_size=config.batch_size, num_streams=config.num_streams, seed=seed
    )
    loaders: list[Loader[Batch]] = [
        Loader(
            location,
            manifest,
            order,
            config,
            rank=rank,
            num_workers=num_workers,
            start_step=steps.start,
            end_step=steps.stop,
            finish=lambda batch: batch,
        )
        for rank in range(num_workers)
    ]
    found = []
    with ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(loader)
        # strict: a rank that gives fewer batches than another is an error.
        for step, parts in zip(steps, zip(*loaders, strict=True), strict=True):
            assert {part.step for part in parts} == {step}
            assert {len(part.keys) for part in parts} == {config.batch_size // num_workers}
            for part in parts:
                red, green, blue = np.rint((part.x_0[:, :, 0, 0].numpy().T + 1) * 127.5).astype(int)
                assert [int(key) for key in part.keys] == ((red << 16) + (green << 8) + blue).tolist()
            found.append([key for part in parts for key in part.keys])
    return found


def steps_per_epoch(data_set: tuple[str, Manifest], config: DataConfig) -> int:
    return data_set[1].num_images // config.batch_size


shard_sizes = st.lists(st.sampled_from([1, 1, 2, 3, 7, 13, 64]), min_size=1, max_size=9).map(tuple)
worlds = st.sampled_from([1, 2, 4])


@st.composite
def set_ups(draw, sizes=shard_sizes):
    """Shard sizes, and a batch size and streams that fit them."""
    chosen = draw(sizes.filter(lambda sizes: sum(sizes) >= 8))
    num_streams = draw(st.sampled_from([4, 8]))
    most = sum(chosen) // num_streams
    per_stream = draw(st.integers(1, min(most, 6))) if most else 0
    if not per_stream:
        num_streams, per_stream = 4, 1
    cache_bytes = draw(st.sampled_from([0, 500, 2**20]))
    config = DataConfig(
        batch_size=num_streams * per_stream,
        num_streams=num_streams,
        loader_cache_bytes=cache_bytes,
        prefetch_batches=draw(st.integers(1, 3)),
    )
    return chosen, config


# More where nobody waits.
many = settings(
    max_examples=60 if os.environ.get("CI") else 20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(set_ups(), worlds, st.integers(0, 3))
def test_every_epoch_delivers_every_image_once_but_a_remainder_below_one_batch(data_sets, set_up, num_workers, seed):
    sizes, config = set_up
    data_set = data_sets(sizes)
    per_epoch = steps_per_epoch(data_set, config)
    batches = read(data_set, config, range(3 * per_epoch), num_workers=num_workers, seed=seed)
    everything = {f"{number:06d}" for number in range(sum(sizes))}
    for epoch in range(3):
        keys = Counter(key for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for key in batch)
        assert set(keys.values()) == {1}
        assert keys.keys() <= everything
        assert len(everything - keys.keys()) == sum(sizes) % config.batch_size < config.batch_size


@many
@given(set_ups(), st.data())
def test_the_global_batches_are_the_same_for_any_number_of_ranks_also_when_it_changes_on_the_way(
    data_sets, set_up, data
):
    sizes, config = set_up
    data_set = data_sets(sizes)
    last = 2 * steps_per_epoch(data_set, config) + 1
    unbroken = read(data_set, config, range(last))
    cuts = sorted(data.draw(st.lists(st.integers(0, last), max_size=3), label="interruptions"))
    resumed = []
    for start, stop in zip([0, *cuts], [*cuts, last], strict=True):
        resumed += read(data_set, config, range(start, stop), num_workers=data.draw(worlds, label="ranks"))
    assert resumed == unbroken


@pytest.mark.slow
@few
@given(set_ups(), st.integers(1, 2), worlds)
def test_loader_processes_change_nothing(data_sets, set_up, loader_workers, num_workers):
    sizes, config = set_up
    data_set = data_sets(sizes)
    steps = range(1, 1 + min(6, 2 * steps_per_epoch(data_set, config)))
    config_with_processes = DataConfig(
        batch_size=config.batch_size, num_streams=config.num_streams, loader_workers=loader_workers
    )
    assert read(data_set, config_with_processes, steps, num_workers=num_workers) == read(data_set, config, steps)


def test_two_then_four_then_one_rank_in_mid_epoch_with_shards_of_1_7_64_and_1000_images(data_sets):
    data_set = data_sets((1, 7, 64, 1000))
    config = DataConfig(batch_size=16, num_streams=8)
    per_epoch = steps_per_epoch(data_set, config)
    unbroken = read(data_set, config, range(per_epoch))
    pieces = [(range(0, 20), 2), (range(20, 41), 4), (range(41, per_epoch), 1)]
    assert [batch for steps, ranks in pieces for batch in read(data_set, config, steps, num_workers=ranks)] == unbroken
    assert len({key for batch in unbroken for key in batch}) == 1072


def test_fewer_shards_than_ranks_is_no_special_case(data_sets):
    data_set = data_sets((40,))
    config = DataConfig(batch_size=8, num_streams=8)
    assert read(data_set, config, range(10), num_workers=8) == read(data_set, config, range(10))


def test_the_remainder_is_another_one_in_every_epoch(data_sets):
    data_set = data_sets((7, 7, 7))
    config = DataConfig(batch_size=8, num_streams=4)
    batches = read(data_set, config, range(2 * 60))
    everything = {f"{number:06d}" for number in range(21)}
    left_out = [frozenset(everything - set(batches[2 * epoch] + batches[2 * epoch + 1])) for epoch in range(60)]
    assert {len(each) for each in left_out} == {5}
    assert len(set(left_out)) > 6
    assert frozenset.union(*left_out) == everything


def test_opening_at_step_1000000_reads_no_more_than_opening_at_step_1(data_sets, monkeypatch):
    data_set = data_sets((64,) * 9)
    config = DataConfig(batch_size=8, num_streams=4)
    from pipeline.data import store as store_module

    opened = []
    open_shard = store_module.ShardStore._open
    monkeypatch.setattr(
        store_module.ShardStore, "_open", lambda self, number, **how: opened.append(number) or open_shard(self, number)
    )
    counts = []
    for step in (1, 1_000_000):
        opened.clear()
        read(data_set, config, range(step, step + 1))
        counts.append(len(opened))
    assert max(counts) <= 9


@many
@given(set_ups(), worlds)
def test_no_batch_touches_more_shards_than_the_plan_says(data_sets, set_up, num_workers):
    sizes, config = set_up
    location, manifest = data_sets(sizes)
    order = StreamOrder(shard_sizes=sizes, batch_size=config.batch_size, num_streams=config.num_streams, seed=0)
    planned = plan_reading(config, manifest, location, num_workers=num_workers).shards_at_once
    for step in range(2 * order.batches_per_epoch):
        for rank in range(num_workers):
            assert (
                len(set(order.shards(step, streams_of_rank(config.num_streams, rank, num_workers)).tolist())) <= planned
            )


def test_one_small_shard_at_the_end_does_not_make_the_plan_expect_many(data_sets):
    location, manifest = data_sets((64,) * 40 + (1,))
    config = DataConfig(batch_size=32, num_streams=4)
    assert plan_reading(config, manifest, location, num_workers=2).shards_at_once == 2 * 2 + 1
