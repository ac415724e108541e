"""Networks that are told classes, and networks that predict v or x_0, learn from real digits."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, small_task

from pipeline.data.loader import Batch, Loader
from pipeline.model_folder import EMA_FILE, build_schedule, build_unet, load_tensors, read_meta
from pipeline.training.loop import noise_of
from pipeline.training.objective import image_losses
from pipeline.training.task import TrainingTask

TINY = {"base_channels": 8, "channel_mult": [1], "attention_resolutions": [], "batch_size": 48}


def later_batches(task: TrainingTask, num_steps: int) -> list[Batch]:
    """Batches of steps that the training did not reach: other noise, and a new order of the images."""
    start, places = task.config.steps, {"rank": 0, "num_workers": 1}
    steps = {"start_step": start, "end_step": start + num_steps}
    with Loader(
        task.location, task.manifest, task.order, task.config.data, **places, **steps, finish=lambda b: b
    ) as loader:
        return list(loader)


@pytest.mark.slow
def test_a_class_conditional_network_does_better_with_right_labels_than_without_and_worst_with_wrong_ones(
    tmp_path: Path,
) -> None:
    knobs = TINY | {"num_classes": 10, "steps": 500, "checkpoint_every": 500, "log_every": 100}
    task = small_task(tmp_path, lr=1e-2, lr_warmup_steps=10, **knobs)
    run_one(task, tmp_path / "out")
    folder = tmp_path / "out" / "step-00000500"
    unet = build_unet(task.config.model)
    unet.load_state_dict(load_tensors(folder, EMA_FILE, read_meta(folder)))
    schedule = build_schedule(task.config.diffusion)
    batches = later_batches(task, 20)

    @torch.no_grad()
    def loss(told: list[Tensor]) -> float:
        parts = [
            image_losses(unet, schedule, task.config, batch.x_0, *noise_of(task.config, batch), labels)
            for batch, labels in zip(batches, told, strict=True)
        ]
        return float(torch.cat(parts).mean())

    right = loss([batch.labels for batch in batches])
    hidden = loss([torch.full_like(batch.labels, 10) for batch in batches])
    wrong = [loss([(batch.labels + shift) % 10 for batch in batches]) for shift in (1, 3, 5)]
    assert right < 0.99 * hidden
    assert hidden < min(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_the_loss_falls_whatever_is_predicted_and_however_it_is_weighted(
    tmp_path: Path, prediction: str, weighting: str
) -> None:
    knobs = TINY | {"steps": 100, "checkpoint_every": 100, "log_every": 20, "lr": 1e-2, "lr_warmup_steps": 10}
    task = small_task(tmp_path, prediction=prediction, loss_weighting=weighting, **knobs)
    losses = [record["train/loss"] for record in run_one(task, tmp_path / "out")]
    assert losses[-1] < 0.75 * losses[0]
