from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.diffusion.averages import Averages, power_stem
from pipeline.diffusion.ema import Ema
from pipeline.diffusion.power_ema import PowerEma
from pipeline.errors import UserError


def averages_of(model: nn.Module, *power: float) -> Averages:
    return Averages(model, decay=0.9, warmup=True, power=power)


def train(model: nn.Module, averages: Averages, steps: range) -> None:
    """Weights of step n are a function of n alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        averages.update(model, step)


def test_without_widths_there_is_the_ema_alone_and_it_is_the_plain_one_bit_for_bit() -> None:
    model = nn.Linear(2, 3)
    averages, ema = averages_of(model), Ema(model, decay=0.9, warmup=True)
    for step in range(5):
        train(model, averages, range(step, step + 1))
        ema.update(model, step)
    assert averages.tensors().keys() == {"ema"}
    for name, tensor in ema.state_dict().items():
        assert torch.equal(averages.tensors()["ema"][name], tensor)


def test_every_width_is_followed_as_it_would_be_alone() -> None:
    model = nn.Linear(2, 3)
    averages = averages_of(model, 0.05, 0.1)
    alone = {width: PowerEma(model, sigma_rel=width) for width in (0.05, 0.1)}
    for step in range(7):
        train(model, averages, range(step, step + 1))
        for average in alone.values():
            average.update(model, step)
    assert list(averages.tensors()) == ["ema", "ema-power-0.050", "ema-power-0.100"]
    for width, average in alone.items():
        assert torch.equal(averages.tensors()[power_stem(width)]["weight"], average.state_dict()["weight"])


def test_resuming_in_the_middle_equals_the_unbroken_averages_bit_for_bit() -> None:
    model = nn.Linear(2, 3)
    unbroken, first = averages_of(model, 0.05, 0.1), averages_of(model, 0.05, 0.1)
    train(model, unbroken, range(20))
    train(model, first, range(9))
    saved = {stem: {k: v.clone() for k, v in tensors.items()} for stem, tensors in first.tensors().items()}
    second = averages_of(nn.Linear(2, 3), 0.05, 0.1)
    second.load(saved)
    train(model, second, range(9, 20))
    for stem, tensors in unbroken.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(second.tensors()[stem][name], tensor), (stem, name)


def test_averages_of_other_widths_are_refused_by_name() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"ema-power-0\.050, ema-power-0\.100 in only one of them"):
        averages_of(model, 0.05).load(averages_of(model, 0.1).tensors())


def test_no_two_widths_share_a_file_name() -> None:
    assert power_stem(0.05) == "ema-power-0.050"
    assert power_stem(0.2) == "ema-power-0.200"
    assert len({power_stem(width) for width in (0.05, 0.0501, 0.050100001, 1e-5, 2e-5)}) == 5


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_and_compile_is_followed_under_its_plain_names() -> None:
    plain = nn.Linear(2, 3)
    wrapped = torch.compile(DistributedDataParallel(plain))
    averages = averages_of(wrapped, 0.05)
    train(plain, averages, range(1))
    averages.update(wrapped, 0)
    for tensors in averages.tensors().values():
        assert tensors.keys() == {"weight", "bias"}
    assert torch.equal(averages.tensors()["ema-power-0.050"]["weight"], plain.weight)


def test_averages_are_float32_whatever_the_models_dtype() -> None:
    averages = averages_of(nn.Linear(2, 3, dtype=torch.bfloat16), 0.05)
    assert {tensor.dtype for tensors in averages.tensors().values() for tensor in tensors.values()} == {torch.float32}
