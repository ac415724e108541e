import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))

from worlds import small_task

from pipeline.diffusion.averages import Averages
from pipeline.errors import WorldError
from pipeline.training.checkpoint import RunState, Saver, load_checkpoint
from pipeline.training.task import TrainingTask
from pipeline.training.worker import Worker, Write


class Background:
    """Writes in a thread of its own, once it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def commit_to(self, folder: Path) -> Callable[[int, Write | None], None]:
        def commit(step: int, write: Write | None) -> None:
            assert write is not None
            thread = threading.Thread(target=self._run, args=(write, str(folder / str(step))))
            self.threads.append(thread)
            thread.start()

        return commit

    def _run(self, write: Write, location: str) -> None:
        self.go.wait()
        try:
            write(location)
        except WorldError as error:
            self.errors.append(error)


def state_of(value: float) -> RunState:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return RunState(unet=model, averages=Averages(model, decay=0.9, warmup=False), optimizer=optimizer, scaler=scaler)


def saver_of(task: TrainingTask, state: RunState, commit: Any) -> Saver:
    worker = Worker(rank=0, num_workers=1, device=torch.device("cpu"), wrap=lambda m: m, log=print, commit=commit)
    return Saver(task, worker, state)


@pytest.fixture
def task(tmp_path: Path) -> TrainingTask:
    return small_task(tmp_path)


def test_what_is_written_later_is_the_state_at_the_time_of_saving(task: TrainingTask, tmp_path: Path) -> None:
    background, state = Background(), state_of(1.0)
    saver = saver_of(task, state, background.commit_to(tmp_path))
    saved = {key: tensor.clone() for key, tensor in state.unet.state_dict().items()}
    moment = state.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    saver.save(5)
    state.unet(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()  # training goes on
    state.averages.update(state.unet, 1)
    background.go.set()
    for thread in background.threads:
        thread.join()
    restored = state_of(0.0)
    assert load_checkpoint(tmp_path / "5", restored) == 5
    for key, tensor in restored.unet.state_dict().items():
        assert torch.equal(tensor, saved[key])
        assert not torch.equal(tensor, state.unet.state_dict()[key])
    assert torch.equal(restored.optimizer.state_dict()["state"][0]["exp_avg"], moment)


def test_the_next_save_waits_until_the_one_before_is_written(task: TrainingTask, tmp_path: Path) -> None:
    background, state = Background(), state_of(1.0)
    saver = saver_of(task, state, background.commit_to(tmp_path))
    saver.save(1)
    second = threading.Thread(target=saver.save, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    background.go.set()
    second.join(10)
    assert not second.is_alive()
    for thread in background.threads:
        thread.join()
    assert load_checkpoint(tmp_path / "1", state_of(0.0)) == 1
    assert load_checkpoint(tmp_path / "2", state_of(0.0)) == 2


def test_a_write_that_fails_leaves_no_checkpoint_and_does_not_hold_up_the_next(
    task: TrainingTask, tmp_path: Path
) -> None:
    background, state = Background(), state_of(1.0)
    background.go.set()
    (tmp_path / "1").write_text("a file where a folder is needed")
    saver = saver_of(task, state, background.commit_to(tmp_path))
    saver.save(1)
    saver.save(2)
    for thread in background.threads:
        thread.join()
    assert len(background.errors) == 1
    assert load_checkpoint(tmp_path / "2", state_of(0.0)) == 2
