import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pipeline.diffusion.ema import Ema, unwrap
from pipeline.errors import UserError


def model_of(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(2, 3, dtype=dtype)
    fill(model, value)
    return model


@torch.no_grad()
def fill(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def weight(ema: Ema) -> float:
    values = ema.state_dict()["weight"].unique().tolist()
    assert len(values) == 1
    return float(values[0])


def test_the_first_update_without_warmup_copies_the_weights_exactly() -> None:
    model = model_of(5.0)
    ema = Ema(model, decay=0.9999, warmup=False)
    fill(model, 0.1)
    ema.update(model, step=0)
    assert torch.equal(ema.state_dict()["weight"], model.weight)


def test_constant_decay_has_its_closed_form() -> None:
    """Weights 1 at the first update and 0 after it: the average is decay^(n - 1)."""
    model = model_of(1.0)
    ema = Ema(model, decay=0.9, warmup=False)
    ema.update(model, step=0)
    fill(model, 0.0)
    for step in range(1, 20):
        ema.update(model, step)
        assert weight(ema) == pytest.approx(0.9**step, rel=1e-5)


def test_a_drifting_weight_is_followed_by_the_geometric_sum() -> None:
    model, decay, n = model_of(0.0), 0.8, 15
    ema = Ema(model, decay=decay, warmup=False)
    for step in range(n):
        fill(model, float(step))
        ema.update(model, step)
    expected = sum((1 - decay) * decay ** (n - 1 - k) * k for k in range(1, n))
    assert weight(ema) == pytest.approx(expected, rel=1e-5)


def test_warmup_has_its_closed_form() -> None:
    """From 1 towards 0, update k keeps (1 + k) / (10 + k): after n updates n! 9! / (n + 9)! is left."""
    model = model_of(1.0)
    ema = Ema(model, decay=0.9999, warmup=True)
    fill(model, 0.0)
    for step in range(12):
        ema.update(model, step)
        n = step + 1
        assert weight(ema) == pytest.approx(1 / math.comb(n + 9, 9), rel=1e-5)


def test_the_decay_of_a_step_depends_on_the_step_alone() -> None:
    constant, warm = Ema(model_of(0), decay=0.999, warmup=False), Ema(model_of(0), decay=0.999, warmup=True)
    assert [constant.decay_at(step) for step in (0, 1, 2, 10**6)] == [0.0, 0.999, 0.999, 0.999]
    assert [warm.decay_at(step) for step in (0, 1, 8990, 8991, 10**6)] == [0.1, 2 / 11, 8991 / 9000, 0.999, 0.999]


def test_resuming_in_the_middle_equals_the_unbroken_average_bit_for_bit() -> None:
    def weights(step: int) -> Tensor:
        return torch.randn(3, 2, generator=torch.Generator().manual_seed(step))

    def follow(ema: Ema, model: nn.Linear, steps: range) -> None:
        for step in steps:
            model.weight.data.copy_(weights(step))
            ema.update(model, step)

    model = model_of(0.0)
    unbroken = Ema(model, decay=0.99, warmup=True)
    follow(unbroken, model, range(10))

    model = model_of(0.0)
    first = Ema(model, decay=0.99, warmup=True)
    follow(first, model, range(4))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = Ema(model_of(9.0), decay=0.99, warmup=True)
    second.load_state_dict(saved)
    follow(second, model_of(3.0), range(4, 10))
    assert torch.equal(second.state_dict()["weight"], unbroken.state_dict()["weight"])


def test_the_shadow_is_float32_and_does_not_alias_the_model() -> None:
    model = model_of(1.0, torch.bfloat16)
    ema = Ema(model, decay=0.999, warmup=False)
    ema.update(model, step=0)
    fill(model, 2.0)
    ema.update(model, step=1)
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert weight(ema) == pytest.approx(1.001, abs=1e-6)  # bfloat16 could not tell it from 1
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.unique().tolist() == [1.0]


def test_buffers_are_copied_not_averaged_and_unsaved_ones_left_out() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    ema = Ema(model, decay=0.9, warmup=False)
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
    ema.update(model, step=5)
    state = ema.state_dict()
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["running_mean"], model.running_mean)
    assert state["num_batches_tracked"].dtype == torch.int64
    assert int(state["num_batches_tracked"]) == 2
    other = nn.BatchNorm1d(3)
    other.load_state_dict(state)
    assert torch.equal(other.running_var, model.running_var)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["ddp", "compile", "ddp of compile", "compile of ddp", "data parallel"])
def test_a_wrapped_model_is_followed_under_its_plain_names(order: str) -> None:
    plain = model_of(1.0)
    wrapped: nn.Module = {
        "ddp": lambda: DistributedDataParallel(plain),
        "compile": lambda: torch.compile(plain),
        "ddp of compile": lambda: DistributedDataParallel(torch.compile(plain)),
        "compile of ddp": lambda: torch.compile(DistributedDataParallel(plain)),
        "data parallel": lambda: DataParallel(plain),
    }[order]()
    assert unwrap(wrapped) is plain
    assert set(wrapped.state_dict()) != set(plain.state_dict())
    ema = Ema(wrapped, decay=0.5, warmup=False)
    assert set(ema.state_dict()) == {"weight", "bias"}
    fill(wrapped, 3.0)
    ema.update(wrapped, step=7)
    assert weight(ema) == 2.0
    fill(wrapped, 0.0)
    ema.copy_to(wrapped)
    assert plain.weight.unique().tolist() == [2.0]


def test_a_model_with_a_compiled_part_is_followed_under_its_plain_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1] = torch.compile(model[1])
    ema = Ema(model, decay=0.5, warmup=False)
    assert set(ema.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    fill(model, 4.0)
    ema.update(model, step=0)
    assert ema.state_dict()["1.weight"].unique().tolist() == [4.0]


def test_starting_an_average_leaves_the_model_alone() -> None:
    model = model_of(1.0)
    ema = Ema(model, decay=0.9, warmup=True)
    ema.state_dict()["weight"].fill_(7.0)
    assert model.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_outside_zero_to_one_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=rf"ema decay {decay}: use a value in \[0, 1\)"):
        Ema(model_of(0), decay=decay, warmup=False)


def test_the_weights_of_another_architecture_are_refused_by_name() -> None:
    ema = Ema(model_of(1.0), decay=0.9, warmup=False)
    with pytest.raises(UserError, match=r"1 tensors .* 'bias'"):
        ema.load_state_dict({"weight": torch.zeros(3, 2)})
    with pytest.raises(UserError, match=r"2 tensors .* 'bias'"):
        ema.load_state_dict({"weight": torch.zeros(4, 2), "bias": torch.zeros(4)})
    assert weight(ema) == 1.0
