"""Power-function averages on weights that were really trained."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, small_task

from pipeline.diffusion.averages import Averages, power_stem
from pipeline.diffusion.posthoc_ema import Snapshot, reconstruct, weighted_sum
from pipeline.model_folder import build_unet, read_meta
from pipeline.training.checkpoint import save_published

STEPS = 120


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    """All averages after every 10th step of a digits run, with the widths 0.08 and 0.15 kept as well, to compare."""
    folder = tmp_path_factory.mktemp("trajectory")
    task = small_task(folder, steps=STEPS, checkpoint_every=1, lr_warmup_steps=10)
    run_one(task, folder / "out")
    unet = build_unet(task.config.model, seed=task.config.seed)
    averages = Averages(unet, decay=0.99, warmup=True, power=(0.05, 0.08, 0.10, 0.15))
    found = {}
    for step in range(STEPS):
        unet.load_state_dict(load_file(folder / "out" / f"step-{step + 1:08d}" / "model.safetensors"))
        averages.update(unet, step)
        if (step + 1) % 10 == 0:
            found[step + 1] = {
                stem: {name: tensor.clone() for name, tensor in tensors.items()}
                for stem, tensors in averages.tensors().items()
            } | {"weights": {name: tensor.clone() for name, tensor in unet.state_dict().items()}}
    return found


@pytest.mark.parametrize(("width", "step", "most"), [(0.08, 120, 0.012), (0.08, 60, 0.012), (0.15, 120, 0.003)])
def test_a_width_made_after_training_is_the_one_that_was_kept_in_training(
    trajectory: dict[int, dict[str, dict[str, Tensor]]], width: float, step: int, most: float
) -> None:
    """From the snapshots of 0.05 and 0.10, 10 steps apart: within 0.2 to 0.8 % of the way to the last weights.

    That is 1e-5 to 1e-4 of the weights.
    """
    steps = range(10, step + 1, 10)
    there = {Snapshot(at, other): trajectory[at][power_stem(other)] for at in steps for other in (0.05, 0.10)}
    weights = reconstruct(there, Snapshot(step, width)).weights
    found = flat(weighted_sum((weight, there[snapshot]) for snapshot, weight in weights.items()))
    kept, last = flat(trajectory[step][power_stem(width)]), flat(trajectory[step]["weights"])
    assert float((found - kept).norm() / (last - kept).norm()) < most
    nearest = min(float((flat(trajectory[step][power_stem(other)]) - kept).norm()) for other in (0.05, 0.10))
    assert float((found - kept).norm()) < nearest / 20


def test_a_resumed_run_has_the_averages_of_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    task = small_task(tmp_path, ema_power=(0.05, 0.10))
    run_one(task, tmp_path / "unbroken")
    run_one(task, tmp_path / "resumed", resume_from=tmp_path / "unbroken" / "step-00000004")
    for file in ("ema-power-0.050.safetensors", "ema-power-0.100.safetensors"):
        half, whole, resumed = (
            (tmp_path / run / f"step-{step:08d}" / file).read_bytes()
            for run, step in (("unbroken", 4), ("unbroken", 8), ("resumed", 8))
        )
        assert resumed == whole != half


def test_what_is_published_has_every_average_that_the_run_keeps(tmp_path: Path) -> None:
    task = small_task(tmp_path, steps=2, checkpoint_every=2, ema_power=(0.05, 0.10))
    run_one(task, tmp_path / "out")
    (published := tmp_path / "published").mkdir()
    save_published(tmp_path / "out" / "step-00000002", published)
    files = {"ema.safetensors", "ema-power-0.050.safetensors", "ema-power-0.100.safetensors"}
    assert {path.name for path in published.iterdir()} == files | {"meta.json"}
    assert read_meta(published).files.keys() == files
