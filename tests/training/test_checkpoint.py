import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from worlds import run_one, small_task

from pipeline.diffusion.averages import Averages
from pipeline.errors import WorldError
from pipeline.model_folder import build_unet, read_meta
from pipeline.training.checkpoint import RunState, load_checkpoint, save_published
from pipeline.training.task import TrainingTask


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[TrainingTask, Path]:
    task = small_task(tmp_path, steps=2, checkpoint_every=2)
    run_one(task, tmp_path / "out")
    return task, tmp_path / "out" / "step-00000002"


def load(task: TrainingTask, folder: Path) -> int:
    unet = build_unet(task.config.model)
    optimizer = torch.optim.Adam(unet.parameters())
    averages, scaler = Averages(unet, decay=0.9, warmup=True), torch.amp.GradScaler("cpu", enabled=False)
    return load_checkpoint(folder, RunState(unet=unet, averages=averages, optimizer=optimizer, scaler=scaler))


def test_a_checkpoint_holds_the_whole_state_and_its_description(checkpoint: tuple[TrainingTask, Path]) -> None:
    task, folder = checkpoint
    assert load(task, folder) == 2
    record = json.loads((folder / "meta.json").read_text())
    assert set(record["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.pt"}
    assert record["data"]["digest"] == task.manifest.digest
    assert record["config"]["schedule"] == "linear"


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"])
def test_a_truncated_file_is_refused_by_name(checkpoint: tuple[TrainingTask, Path], name: str) -> None:
    task, folder = checkpoint
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(WorldError, match=name):
        load(task, folder)


def test_a_pickle_in_place_of_the_optimizer_state_is_never_executed(
    checkpoint: tuple[TrainingTask, Path], tmp_path: Path
) -> None:
    task, folder = checkpoint
    harm = tmp_path / "harm"
    payload = pickle.dumps(_Touch(harm))
    (folder / "optimizer.pt").write_bytes(payload)
    meta = json.loads((folder / "meta.json").read_text())
    import hashlib

    meta["files"]["optimizer.pt"] = hashlib.sha256(payload).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises((WorldError, pickle.UnpicklingError)):
        load(task, folder)
    assert not harm.exists()


def test_a_checkpoint_of_another_network_is_refused(checkpoint: tuple[TrainingTask, Path], tmp_path: Path) -> None:
    _, folder = checkpoint
    other = small_task(tmp_path, base_channels=16)
    with pytest.raises(WorldError, match="does not fit this network"):
        load(other, folder)


def test_what_is_published_is_the_ema_and_its_description_alone(
    checkpoint: tuple[TrainingTask, Path], tmp_path: Path
) -> None:
    _, folder = checkpoint
    published = tmp_path / "published"
    published.mkdir()
    assert save_published(folder, published) == 2
    assert {path.name for path in published.iterdir()} == {"ema.safetensors", "meta.json"}
    assert (published / "ema.safetensors").read_bytes() == (folder / "ema.safetensors").read_bytes()
    assert read_meta(published).config == read_meta(folder).config


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)
