"""Random numbers as pure functions of their arguments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draws import Purpose, generator, integers, permutation, standard_normal, torch_seed, uniform

SEEDS = st.integers(0, 2**63 - 1)
INDICES = st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple)
PURPOSES = st.sampled_from(list(Purpose))
MODEST = settings(deadline=None, max_examples=50)


@MODEST
@given(SEEDS, PURPOSES, INDICES)
def test_the_same_arguments_give_the_same_numbers_whatever_was_drawn_before(seed, purpose, indices):
    first = (
        permutation(20, seed, purpose, *indices).tolist(),
        integers(20, 1000, seed, purpose, *indices).tolist(),
        standard_normal((3, 4), seed, purpose, *indices).tolist(),
        torch_seed(seed, purpose, *indices),
    )
    standard_normal((7,), seed + 1, Purpose.NOISE)
    second = (
        permutation(20, seed, purpose, *indices).tolist(),
        integers(20, 1000, seed, purpose, *indices).tolist(),
        standard_normal((3, 4), seed, purpose, *indices).tolist(),
        torch_seed(seed, purpose, *indices),
    )
    assert first == second


def test_no_draw_touches_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    standard_normal((100,), 1, Purpose.NOISE)
    permutation(100, 1, Purpose.SHARD_ORDER)
    integers(100, 10, 1, Purpose.TIMESTEP)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_neighbouring_seeds_purposes_and_indices_never_share_a_word():
    draws = [
        (seed, purpose, step, stream) for seed in (0, 1) for purpose in Purpose for step in (0, 1) for stream in (0, 1)
    ]
    words = [word for draw in draws for word in integers(50, 2**62, *draw).tolist()]
    assert len(set(words)) == len(words) == len(draws) * 50


def test_the_place_of_an_index_matters():
    assert torch_seed(0, Purpose.NOISE, 1, 2) != torch_seed(0, Purpose.NOISE, 2, 1)


@MODEST
@given(SEEDS, PURPOSES, INDICES, st.integers(0, 100))
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(seed, purpose, indices, n):
    assert torch.equal(integers(n, 77, seed, purpose, *indices), integers(200, 77, seed, purpose, *indices)[:n])
    assert torch.equal(
        standard_normal((n,), seed, purpose, *indices), standard_normal((200,), seed, purpose, *indices)[:n]
    )


@MODEST
@given(SEEDS, PURPOSES, INDICES, st.integers(0, 300))
def test_a_permutation_holds_each_number_once(seed, purpose, indices, n):
    assert sorted(permutation(n, seed, purpose, *indices).tolist()) == list(range(n))


def test_every_order_of_three_is_about_equally_likely():
    orders = [tuple(permutation(3, 0, Purpose.IMAGE_ORDER, epoch).tolist()) for epoch in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert all(900 < count < 1100 for count in counts)


def test_permutations_have_not_changed_since_the_first_release():
    assert permutation(10, 0, Purpose.SHARD_ORDER, 0).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(12, 2**63 - 1, Purpose.IMAGE_ORDER, 3, 5).tolist() == [8, 0, 10, 6, 11, 1, 9, 7, 5, 4, 2, 3]


def test_integers_and_seeds_have_not_changed_since_the_first_release():
    assert integers(6, 1000, 0, Purpose.TIMESTEP, 7, 2).tolist() == [591, 715, 434, 236, 736, 877]
    assert torch_seed(0, Purpose.INIT) == 4767345267979153683
    assert torch_seed(1, Purpose.DROPOUT, 3) == 8536963407010130925


def test_uniform_numbers_have_not_changed_since_the_first_release():
    assert uniform(3, 0, Purpose.LABEL_DROPOUT, 7, 2).tolist() == [
        0.14011184664255405,
        0.8541344718567065,
        0.9084967554136741,
    ]


def test_normal_draws_have_not_changed_since_the_first_release():
    assert standard_normal((4,), 0, Purpose.NOISE, 7, 2).tolist() == [
        1.2441551685333252,
        -2.1366419792175293,
        -0.881951093673706,
        0.2152227908372879,
    ]


def test_purposes_keep_their_numbers():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SHARD_ORDER": 1,
        "IMAGE_ORDER": 2,
        "FLIP": 3,
        "TIMESTEP": 4,
        "NOISE": 5,
        "INIT": 6,
        "DROPOUT": 7,
        "SAMPLE": 8,
        "SAMPLE_STEP": 9,
        "SUBSTITUTE": 10,
        "HOLDOUT": 11,
        "LABEL_DROPOUT": 12,
        "SAMPLE_LABEL": 13,
        "REFERENCE_SAMPLE": 14,
        "BOUND_TIMESTEP": 15,
        "BOUND_NOISE": 16,
        "BOUND_IMAGE": 17,
        "SWEEP_POINT": 21,
        "SHOW_IMAGE": 18,
        "SHOW_NOISE": 19,
        "SHOW_STEP": 20,
    }


def test_normal_draws_have_the_moments_of_a_standard_normal():
    x = standard_normal((200_000,), 3, Purpose.NOISE).double()
    assert abs(x.mean().item()) < 0.01
    assert abs(x.var().item() - 1) < 0.015
    assert abs((x**3).mean().item()) < 0.03
    assert abs((x**4).mean().item() - 3) < 0.08


def test_normal_draws_are_float32_of_the_shape_asked_for():
    x = standard_normal((2, 3, 4, 5), 0, Purpose.NOISE)
    assert (x.shape, x.dtype) == ((2, 3, 4, 5), torch.float32)


def test_noise_of_different_steps_is_uncorrelated():
    a, b = (standard_normal((100_000,), 0, Purpose.NOISE, step).double() for step in (0, 1))
    assert abs((a * b).mean().item()) < 0.015


@MODEST
@given(SEEDS, st.integers(1, 2**40))
def test_integers_lie_in_range(seed, high):
    drawn = integers(200, high, seed, Purpose.TIMESTEP)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < high


def test_integers_reach_both_ends_of_the_range_equally_often():
    counts = torch.bincount(integers(40_000, 4, 0, Purpose.TIMESTEP), minlength=4)
    assert all(9_600 < count < 10_400 for count in counts.tolist())


@MODEST
@given(SEEDS, PURPOSES, INDICES)
def test_uniform_numbers_are_doubles_that_never_reach_one(seed, purpose, indices):
    drawn = uniform(200, seed, purpose, *indices)
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() <= drawn.max() < 1


def test_uniform_numbers_have_the_moments_of_the_unit_interval():
    drawn = uniform(40_000, 0, Purpose.LABEL_DROPOUT)
    assert abs(drawn.mean().item() - 1 / 2) < 0.006
    assert abs(drawn.var().item() - 1 / 12) < 0.002


@MODEST
@given(SEEDS, PURPOSES, INDICES)
def test_torch_seeds_are_accepted_by_torch(seed, purpose, indices):
    value = torch_seed(seed, purpose, *indices)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)


def test_a_fourth_index_is_a_programming_error():
    with pytest.raises(AssertionError, match="three words"):
        generator(0, Purpose.NOISE, 1, 2, 3, 4)
