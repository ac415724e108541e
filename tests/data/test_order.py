"""The order of images: exact, independent of the number of workers, computed from the step."""

from collections import Counter
from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import order as order_module
from pipeline.data.order import StreamOrder, streams_of_rank
from pipeline.errors import UserError


def stream_positions(order, step, stream):
    """(shard, index) of one stream's images."""
    shards, indices = order.locate(step, range(stream, stream + 1))
    assert order.shards(step, range(stream, stream + 1)).tolist() == shards.tolist()
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


MODEST = settings(deadline=None, max_examples=40)


@st.composite
def orders(draw, num_streams=(1, 2, 4, 8)):
    shard_sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 7, 64, 333]), min_size=1, max_size=8)))
    num_streams = draw(st.sampled_from([s for s in num_streams if s <= sum(shard_sizes)] or [1]))
    most = min(sum(shard_sizes) // num_streams, 6)
    return StreamOrder(
        shard_sizes=shard_sizes,
        batch_size=num_streams * draw(st.integers(1, most)),
        num_streams=num_streams,
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def epoch_of(order: StreamOrder, epoch: int) -> list[tuple[int, int]]:
    steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
    return [position for step in steps for position in order.global_batch(step)]


@MODEST
@given(orders(), st.integers(0, 3))
def test_an_epoch_delivers_exactly_images_per_epoch_images_each_at_most_once(order, epoch):
    delivered = epoch_of(order, epoch)
    assert len(delivered) == len(set(delivered)) == order.images_per_epoch
    assert all(0 <= index < order.shard_sizes[shard] for shard, index in delivered)
    assert order.num_images - order.images_per_epoch == order.remainder < order.batch_size


@MODEST
@given(orders(num_streams=(4, 8)), st.integers(0, 500))
def test_concatenated_ranks_give_the_same_global_batch_for_1_2_and_4_workers(order, step):
    if order.num_streams % 4:
        return
    for num_workers in (1, 2, 4):
        parts = [
            stream_positions(order, step, stream)
            for rank in range(num_workers)
            for stream in streams_of_rank(order.num_streams, rank, num_workers)
        ]
        assert list(chain(*parts)) == order.global_batch(step)


@MODEST
@given(orders(), st.integers(0, 40))
def test_resuming_at_any_step_equals_the_suffix_of_the_unbroken_sequence(order, start):
    unbroken = [order.global_batch(step) for step in range(start + 10)]
    fresh = StreamOrder(
        shard_sizes=order.shard_sizes, batch_size=order.batch_size, num_streams=order.num_streams, seed=order.seed
    )
    assert [fresh.global_batch(step) for step in range(start, start + 10)] == unbroken[start:]


@MODEST
@given(orders())
def test_every_stream_gives_equally_many_images_to_every_batch(order):
    for step in range(min(order.batches_per_epoch, 5) + 1):
        sizes = {len(stream_positions(order, step, stream)) for stream in range(order.num_streams)}
        assert sizes == {order.batch_size // order.num_streams}


@pytest.mark.parametrize("shard_sizes", [(1,) * 64, (7,) * 10, (64,), (1000, 1000), (64, 1, 7, 1000)])
def test_every_image_comes_exactly_once_when_the_batch_divides_the_data_set(shard_sizes):
    num_images = sum(shard_sizes)
    batch_size = next(b for b in (8, 10, 16, 4) if num_images % b == 0)
    order = StreamOrder(shard_sizes=shard_sizes, batch_size=batch_size, num_streams=2, seed=3)
    everything = {(shard, index) for shard, size in enumerate(shard_sizes) for index in range(size)}
    assert Counter(epoch_of(order, 5)) == Counter(everything)


@MODEST
@given(orders(), st.integers(0, 10**6), st.integers(0, 20))
def test_a_substitute_is_an_image_of_the_data_set_that_depends_on_seed_and_place_alone(order, step, attempt):
    shard, index = order.substitute(step, 0, 3, attempt)
    assert 0 <= index < order.shard_sizes[shard]
    fresh = StreamOrder(
        shard_sizes=order.shard_sizes, batch_size=order.num_streams, num_streams=order.num_streams, seed=order.seed
    )
    assert fresh.substitute(step, 0, 3, attempt) == (shard, index)


def test_substitutes_of_other_places_attempts_and_seeds_are_others_and_every_image_may_be_one():
    order, other = (StreamOrder(shard_sizes=(3, 1, 4), batch_size=4, num_streams=2, seed=seed) for seed in (0, 1))
    places = list(product((0, 1), (0, 1), (0, 1), range(40)))
    drawn = [order.substitute(*place) for place in places]
    assert set(drawn) == set(order_positions(order))
    assert max(Counter(drawn).values()) < 2 * len(drawn) / order.num_images
    assert drawn != [other.substitute(*place) for place in places]
    assert len({tuple(drawn[start : start + 40]) for start in range(0, len(drawn), 40)}) == 8


def test_one_shard_feeds_more_workers_than_there_are_shards():
    order = StreamOrder(shard_sizes=(64,), batch_size=8, num_streams=8, seed=0)
    by_rank = [
        [p for step in range(8) for s in streams_of_rank(8, rank, 8) for p in stream_positions(order, step, s)]
        for rank in range(8)
    ]
    assert [len(part) for part in by_rank] == [8] * 8
    assert len({p for part in by_rank for p in part}) == 64


def test_epochs_differ_and_seeds_differ():
    order = StreamOrder(shard_sizes=(50, 50), batch_size=10, num_streams=2, seed=0)
    other = StreamOrder(shard_sizes=(50, 50), batch_size=10, num_streams=2, seed=1)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(other, 0)


def test_the_remainder_that_an_epoch_leaves_out_is_another_one_every_epoch():
    order = StreamOrder(shard_sizes=(10, 9), batch_size=4, num_streams=2, seed=0)
    everything = set(order_positions(order))
    left_out = [frozenset(everything - set(epoch_of(order, epoch))) for epoch in range(10)]
    assert {len(each) for each in left_out} == {3}
    assert len(set(left_out)) > 5
    assert everything == {p for epoch in range(10) for p in epoch_of(order, epoch)}


def order_positions(order: StreamOrder) -> list[tuple[int, int]]:
    return [(shard, index) for shard, size in enumerate(order.shard_sizes) for index in range(size)]


def test_the_order_of_a_seed_never_changes():
    # Written down once: a change here would break every run that is resumed across it.
    order = StreamOrder(shard_sizes=(3, 5, 4), batch_size=4, num_streams=2, seed=7)
    recorded = [
        [(1, 4), (1, 0), (2, 1), (2, 0)],
        [(1, 3), (1, 1), (2, 3), (0, 0)],
        [(1, 2), (2, 2), (0, 1), (0, 2)],
        [(2, 1), (2, 0), (0, 2), (1, 1)],
    ]
    assert [order.global_batch(step) for step in range(4)] == recorded


def count_permutations(monkeypatch, order: StreamOrder, steps: range) -> int:
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return permutation(*arguments)

    permutation = order_module.permutation
    with monkeypatch.context() as patch:
        patch.setattr(order_module, "permutation", counted)
        for step in steps:
            order.global_batch(step)
    return len(calls)


def test_opening_at_step_1_000_000_permutes_no_more_shards_than_opening_at_step_1(monkeypatch):
    def fresh():
        return StreamOrder(shard_sizes=(1000,) * 50, batch_size=128, num_streams=8, seed=0)

    early = count_permutations(monkeypatch, fresh(), range(1, 2))
    late = count_permutations(monkeypatch, fresh(), range(1_000_000, 1_000_001))
    assert early <= 1 + 2 * 8
    assert late <= 1 + 2 * 8


def test_a_shard_is_permuted_once_for_every_stream_block_that_passes_through_it(monkeypatch):
    order = StreamOrder(shard_sizes=(100,) * 20, batch_size=40, num_streams=4, seed=0)
    assert count_permutations(monkeypatch, order, range(order.batches_per_epoch)) == 1 + 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 10, "num_streams": 4}, "--num-streams 4 does not divide --batch-size 10"),
        ({"batch_size": 128, "num_streams": 4}, "data set has 100 images, fewer than --batch-size 128"),
        ({"batch_size": 0, "num_streams": 1}, "--batch-size 0"),
        ({"batch_size": 8, "num_streams": 0}, "--num-streams 0"),
    ],
)
def test_impossible_numbers_are_refused_with_the_flag_to_change(fields, message):
    with pytest.raises(UserError, match=message):
        StreamOrder(shard_sizes=(60, 40), seed=0, **fields)


def test_more_workers_than_streams_are_refused():
    with pytest.raises(UserError, match=r"--num-workers 9: .* 8 streams; give 1 to 8"):
        streams_of_rank(8, 0, 9)


def test_ranks_own_contiguous_blocks_of_streams():
    assert [list(streams_of_rank(8, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(streams_of_rank(8, 0, 1)) == list(range(8))
    assert [list(streams_of_rank(8, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_substitutes_belong_to_seed_step_stream_place_and_attempt():
    order = StreamOrder(shard_sizes=(5, 1, 9), batch_size=4, num_streams=2, seed=3)
    places = [
        (step, stream, slot, attempt) for step in range(9) for stream in (0, 1) for slot in (0, 1) for attempt in (0, 1)
    ]
    drawn = [order.substitute(*place) for place in places]
    assert drawn == [order.substitute(*place) for place in places]
    assert {shard for shard, _ in drawn} == {0, 1, 2}
    assert all(0 <= index < order.shard_sizes[shard] for shard, index in drawn)
    assert len(set(drawn)) > 10
