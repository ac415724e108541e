import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, run_world, small_task, with_knobs

from pipeline.config import OptimizerConfig
from pipeline.data.loader import Loader
from pipeline.errors import WorldError
from pipeline.training.loop import is_due, learning_rate, noise_of
from pipeline.training.meter import Meter
from pipeline.training.task import TrainingTask
from pipeline.training.worker import HopelessError, Worker

STATE_FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt")


def batches(task: TrainingTask, num_workers: int, steps: range) -> list[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Keys, t and eps of the global batches as ``num_workers`` workers see them together."""
    loaders = [
        Loader(
            task.location,
            task.manifest,
            task.order,
            task.config.data,
            rank=rank,
            num_workers=num_workers,
            start_step=steps.start,
            end_step=steps.stop,
            finish=lambda batch: batch,
        )
        for rank in range(num_workers)
    ]
    found = []
    for parts in zip(*loaders, strict=True):
        noise = [noise_of(task.config, part) for part in parts]
        keys = [key for part in parts for key in part.keys]
        found.append((keys, torch.cat([t for t, _ in noise]), torch.cat([eps for _, eps in noise])))
    return found


def test_one_two_and_four_workers_get_the_same_images_t_and_noise_at_every_step(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    steps = range(145, 155)  # crosses an epoch: 1797 // 12 = 149 steps
    single = batches(task, 1, steps)
    assert len(single) == 10
    for num_workers in (2, 4):
        for (keys, t, eps), (other_keys, other_t, other_eps) in zip(
            single, batches(task, num_workers, steps), strict=True
        ):
            assert keys == other_keys
            assert torch.equal(t, other_t)
            assert torch.equal(eps, other_eps)


def test_timesteps_cover_the_whole_range_and_noise_differs_between_steps(tmp_path: Path) -> None:
    found = batches(small_task(tmp_path, T=50), 1, range(0, 60))
    t = torch.cat([t for _, t, _ in found])
    assert t.min() == 0
    assert t.max() == 49
    assert not torch.equal(found[0][2], found[1][2])


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    task = small_task(tmp_path, dropout=0.2, random_flip=True)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    records = run_one(task, unbroken)
    first = run_one(with_knobs(task, steps=8, checkpoint_every=4), broken)
    assert records[0].keys() == first[0].keys()
    for name in STATE_FILES:
        (broken / "step-00000008" / name).unlink()
    resumed = tmp_path / "resumed"
    tail = run_one(task, resumed, resume_from=broken / "step-00000004")
    assert [record["step"] for record in tail] == [6, 8]
    assert [r["train/loss"] for r in records if r["step"] > 4] == [r["train/loss"] for r in tail]
    for name in STATE_FILES:
        a, b = (folder / "step-00000008" / name for folder in (unbroken, resumed))
        assert a.read_bytes() == b.read_bytes(), name


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    task = small_task(tmp_path, steps=4)
    run_one(task, tmp_path / "out")
    assert run_one(task, tmp_path / "again", resume_from=tmp_path / "out" / "step-00000004") == []
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_one_and_two_workers_agree_in_their_weights_after_50_steps(tmp_path: Path) -> None:
    task = small_task(tmp_path, steps=50, checkpoint_every=50)
    run_one(task, tmp_path / "one")
    run_world(task, 2, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "step-00000050" / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "one" / "step-00000050" / "ema.safetensors")
    assert max((one[key] - start[key]).abs().max().item() for key in one) > 1e-3  # it has learned something
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4


@pytest.mark.slow
def test_three_resumed_workers_equal_three_unbroken_ones_bit_for_bit(tmp_path: Path) -> None:
    task = small_task(tmp_path, dropout=0.1)
    run_world(task, 3, tmp_path / "unbroken")
    run_world(task, 3, tmp_path / "resumed", resume_from=tmp_path / "unbroken" / "step-00000004")
    for name in STATE_FILES:
        a, b = (tmp_path / folder / "step-00000008" / name for folder in ("unbroken", "resumed"))
        assert a.read_bytes() == b.read_bytes(), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    task = small_task(tmp_path, lr=1e30, lr_warmup_steps=1, grad_clip=0.0, log_every=4)
    with pytest.raises(WorldError, match=r"not finite at step [1-3]\b"):
        run_one(task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_carry_the_promised_keys_and_the_right_number_of_images(tmp_path: Path) -> None:
    records = run_one(small_task(tmp_path), tmp_path / "out")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert records[-1]["train/images_seen"] == 8 * 12
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert set(records[0]) == {
        "step",
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/images_seen",
        "perf/images_per_second",
        "perf/step_seconds",
        "perf/data_wait_ratio",
        "perf/memory_bytes",
        "data/bad_images",
    }


def test_the_loss_falls_on_real_digits(tmp_path: Path) -> None:
    task = small_task(tmp_path, steps=120, log_every=20, checkpoint_every=120, lr=5e-3, lr_warmup_steps=10)
    losses = [record["train/loss"] for record in run_one(task, tmp_path / "out")]
    assert losses[-1] < 0.5 * losses[0]


def test_warm_up_starts_at_zero_and_ends_at_lr_as_in_the_papers_code() -> None:
    config = OptimizerConfig(lr=2e-4, lr_warmup_steps=5000, lr_decay="constant")
    assert learning_rate(config, 0, 10**6) == 0
    assert learning_rate(config, 2500, 10**6) == pytest.approx(1e-4)
    assert learning_rate(config, 5000, 10**6) == 2e-4
    assert learning_rate(config, 999_999, 10**6) == 2e-4


def test_cosine_decay_falls_from_lr_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, lr_warmup_steps=10, lr_decay="cosine")
    rates = [learning_rate(config, step, 110) for step in range(10, 111)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)


def test_something_periodic_is_due_on_its_period_and_after_the_last_step() -> None:
    assert [done for done in range(1, 8) if is_due(done, 3, 7)] == [3, 6, 7]


def meter_of(task: TrainingTask) -> Meter:
    worker = Worker(rank=0, num_workers=1, device=torch.device("cpu"), wrap=lambda m: m, log=print, commit=print)
    return Meter(task, worker, 0)


def test_damage_is_counted_by_window_and_judged_by_epoch_also_when_an_epoch_ends_within_a_window(
    tmp_path: Path,
) -> None:
    task = small_task(tmp_path, on_bad_data="skip", max_bad_fraction=3 / 1788)  # 3 images of an epoch of 149 steps
    zero = torch.zeros(())

    def feed(meter: Meter, steps: range, bad: dict[int, int]) -> float:
        for step in steps:
            meter.add(step, zero, zero, bad.get(step, 0))
        return meter.summary(steps.stop, 0.0, 0.0)["data/bad_images"]

    meter = meter_of(task)
    assert feed(meter, range(0, 100), {5: 2}) == 2
    assert feed(meter, range(100, 160), {120: 1, 155: 3}) == 4  # three in each epoch: not too many
    assert feed(meter, range(160, 170), {}) == 0
    with pytest.raises(HopelessError, match=r"4 of the 1788 images .* --max-bad-fraction"):
        feed(meter, range(170, 180), {175: 1})
    with pytest.raises(HopelessError, match="4 of the 1788"):
        feed(meter_of(task), range(0, 310), {10: 4})  # in an epoch that is over when the window ends


def test_a_training_in_two_parts_equals_the_unbroken_one_though_the_learning_rate_decays(tmp_path: Path) -> None:
    task = small_task(tmp_path, lr_warmup_steps=2, lr_decay="cosine")
    run_one(task, tmp_path / "unbroken")
    first = run_one(replace(task, until=4), tmp_path / "parts")
    assert first[-1]["step"] == 4
    assert not (tmp_path / "parts" / "step-00000008").exists()
    run_one(task, tmp_path / "parts", resume_from=tmp_path / "parts" / "step-00000004")
    for name in STATE_FILES:
        a, b = (tmp_path / folder / "step-00000008" / name for folder in ("unbroken", "parts"))
        assert a.read_bytes() == b.read_bytes()
    assert TrainingTask.from_json(replace(task, until=4).to_json()).last_step == 4
