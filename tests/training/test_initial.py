"""A new run starts from the weights of a model folder, and from nothing else of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import override
from pipeline.errors import UserError, WorldError
from pipeline.model_folder import EMA_FILE, build_unet, load_tensors, read_meta, write_meta, write_tensors
from pipeline.training.checkpoint import MODEL_FILE
from pipeline.training.initial import load_initial_weights
from pipeline.training.task import TrainingTask, differences, plan

sys.path.append(str(Path(__file__).parent))
from worlds import run_one, small_task, with_knobs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainingTask:
    return small_task(tmp_path_factory.mktemp("data"))


@pytest.fixture
def model(task: TrainingTask, tmp_path: Path) -> Path:
    """A model of the task's network, with other weights than its seed gives."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tensors(folder, EMA_FILE, build_unet(task.config.model, seed=77).state_dict())
    write_meta(folder, step=5, config=task.config, data=task.data_record, code={})
    return folder


def weights_after(task: TrainingTask, out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / f"step-{step:08d}"
    return load_tensors(folder, MODEL_FILE, read_meta(folder))


def test_training_starts_from_the_weights_of_the_model(task, model, tmp_path):
    # With a learning rate of next to nothing the first steps leave the weights where they were.
    still = with_knobs(task, init_from=str(model), lr=1e-30, steps=4)
    run_one(still, tmp_path / "run")
    expected, found = build_unet(task.config.model, seed=77).state_dict(), weights_after(still, tmp_path / "run", 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-20)


def test_a_continued_run_does_not_start_anew_from_the_model(task, model, tmp_path):
    started = with_knobs(task, init_from=str(model))
    run_one(started, tmp_path / "whole")
    (model / EMA_FILE).unlink()  # whoever still read it would fail
    run_one(started, tmp_path / "resumed", tmp_path / "whole" / "step-00000004")
    whole, resumed = (weights_after(started, tmp_path / name, 8) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_network_is_refused_before_anything_starts(task, model):
    config = override(task.config, {"init_from": str(model), "base_channels": 16, "dropout": 0.1})
    with pytest.raises(UserError, match=r"is another network: --base-channels was 8, now 16; give these flags"):
        plan(config)


def test_another_dropout_is_the_same_network(task, model):
    assert plan(override(task.config, {"init_from": str(model), "dropout": 0.1})).config.init_from == str(model)


def test_what_is_no_model_is_refused(task, tmp_path):
    with pytest.raises(UserError, match=rf"--init-from {tmp_path} is no model: give a folder with ema.safetensors"):
        plan(override(task.config, {"init_from": str(tmp_path)}))


def test_damaged_weights_are_refused_by_name(task, model):
    (model / EMA_FILE).write_bytes((model / EMA_FILE).read_bytes()[:-1])
    config = replace(task.config, init_from=str(model))
    with pytest.raises(WorldError, match=r"ema.safetensors is damaged"):
        load_initial_weights(build_unet(config.model), config)


def test_a_run_is_not_continued_with_other_initial_weights(task):
    assert differences(replace(task.config, init_from="b"), {"init_from": "a"}) == ["init_from was a, now b"]
