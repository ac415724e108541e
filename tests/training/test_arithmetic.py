import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, run_world, small_task, with_knobs

from pipeline.config import ComputeConfig
from pipeline.training.arithmetic import Arithmetic, make_optimizer
from pipeline.training.meter import Meter
from pipeline.training.task import TrainingTask
from pipeline.training.worker import Worker

CPU = torch.device("cpu")


def weights(out: Path, step: int = 8, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / f"step-{step:08d}" / f"{name}.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def gradients_of_first_step(task: TrainingTask, tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    """Plain gradient descent of one step with rate 1: the difference of the weights is the gradient."""
    import pipeline.training.loop as loop

    found: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:

        def note(self: Arithmetic, optimizer: torch.optim.Optimizer, parameters: list, max_norm: float) -> torch.Tensor:
            found.update({str(index): each.grad.clone() for index, each in enumerate(parameters)})
            return torch.zeros(())

        patch.setattr(loop.Arithmetic, "step", note)
        run_one(with_knobs(task, steps=1, checkpoint_every=1, log_every=1), tmp_path / name)
    return found


@pytest.mark.parametrize("micro_batch_size", [1, 4, 5, 12, 100])
def test_the_gradient_of_parts_is_the_gradient_of_the_whole_batch(tmp_path: Path, micro_batch_size: int) -> None:
    task = small_task(tmp_path)
    whole = gradients_of_first_step(task, tmp_path, "whole")
    parts = gradients_of_first_step(with_knobs(task, micro_batch_size=micro_batch_size), tmp_path, "parts")
    norm = math.sqrt(sum(each.square().sum().item() for each in whole.values()))
    assert norm > 0.1
    assert largest_difference(whole, parts) < 1e-6 * max(1, norm)


@pytest.mark.slow
def test_workers_with_unlike_numbers_of_images_take_the_steps_of_one_worker(tmp_path: Path) -> None:
    # 4 streams on 3 workers: 1, 1 and 2 streams, the last in two parts.
    task = small_task(tmp_path, num_streams=4, steps=20, checkpoint_every=20)
    run_one(task, tmp_path / "one")
    run_world(with_knobs(task, micro_batch_size=5), 3, tmp_path / "three")
    one, three = weights(tmp_path / "one", 20), weights(tmp_path / "three", 20)
    assert largest_difference(one, weights(tmp_path / "one", 20, "ema")) > 5e-4  # it has learned something
    assert largest_difference(one, three) < 1e-4


@pytest.mark.slow
def test_three_resumed_workers_with_parts_equal_three_unbroken_ones_bit_for_bit(tmp_path: Path) -> None:
    task = small_task(tmp_path, dropout=0.1, num_streams=4, micro_batch_size=2, precision="bf16")
    run_world(task, 3, tmp_path / "unbroken")
    run_world(task, 3, tmp_path / "resumed", resume_from=tmp_path / "unbroken" / "step-00000004")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        a, b = (tmp_path / folder / "step-00000008" / name for folder in ("unbroken", "resumed"))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_and_resumes_bit_for_bit(tmp_path: Path, precision: str) -> None:
    task = small_task(tmp_path, precision=precision, dropout=0.1)
    records = run_one(task, tmp_path / "out")
    assert all(math.isfinite(record["train/loss"]) for record in records)
    state = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    full = tmp_path / "full"
    run_one(with_knobs(task, precision="fp32"), full)
    assert 0 < largest_difference(state, weights(full)) < 0.05
    run_one(task, tmp_path / "resumed", resume_from=tmp_path / "out" / "step-00000004")
    names = {path.name for path in (tmp_path / "out" / "step-00000008").iterdir()}
    assert ("scaler.json" in names) == (precision == "fp16")
    for name in names - {"meta.json"}:
        a, b = (tmp_path / folder / "step-00000008" / name for folder in ("out", "resumed"))
        assert a.read_bytes() == b.read_bytes(), name


def test_a_float16_overflow_leaves_a_step_out_and_is_no_divergence(tmp_path: Path) -> None:
    arithmetic = Arithmetic(ComputeConfig(precision="fp16"), CPU)
    layer = torch.nn.Linear(2, 1)
    optimizer = make_optimizer(layer, lr=0.1, eps=1e-8, device=CPU)
    before = layer.weight.detach().clone()
    arithmetic.backward((layer(torch.ones(1, 2)) * float("inf")).sum())
    norm = arithmetic.step(optimizer, list(layer.parameters()), 1.0)
    assert not torch.isfinite(norm)
    assert torch.equal(layer.weight, before)
    assert arithmetic.scaler.get_scale() == 2.0**15
    worker = Worker(rank=0, num_workers=1, device=CPU, wrap=lambda m: m, log=print, commit=print)
    meter = Meter(small_task(tmp_path), worker, 0, may_overflow=arithmetic.may_overflow)
    meter.add(0, torch.tensor(1.0), norm, 0)
    assert meter.summary(1, 0.1, 0.0)["train/loss"] == 1.0


@pytest.mark.slow
def test_a_compiled_network_has_the_same_names_its_average_moves_and_it_takes_the_same_steps(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    run_one(task, tmp_path / "plain")
    run_one(with_knobs(task, compile=True), tmp_path / "compiled")
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < 1e-4
    first, last = weights(tmp_path / "compiled", 4, "ema"), weights(tmp_path / "compiled", 8, "ema")
    assert largest_difference(first, last) > 1e-4
    assert largest_difference(last, weights(tmp_path / "plain", 8, "ema")) < 1e-4
