"""How much longer steps of the CIFAR-10 network take because of a checkpoint: one worker, without Ray.

The checkpoint is written to a local disk by a thread beside the steps, as in a job. ``training.py`` runs it.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from pipeline.config import override
from pipeline.presets import preset
from pipeline.training.loop import train
from pipeline.training.task import plan
from pipeline.training.worker import Record, Worker, Write

_EVERY, _CHECKPOINTS = 8, 3


def main(data: str) -> dict[str, list[float]]:
    """Trains some steps with checkpoints between them.

    Args:
        data: A data set of 32x32 RGB images.

    Returns:
        Seconds: of each ``step`` that no checkpoint touches, of each checkpoint's ``copy``, and the ``extra`` time of
        all steps after a checkpoint until it is written.
    """
    knobs = {"data": data, "batch_size": 8, "num_streams": 1, "num_workers": 1, "cpus_per_worker": 2, "log_every": 1}
    steps = _EVERY * (_CHECKPOINTS + 1)
    config = override(preset("cifar10"), knobs | {"steps": steps, "checkpoint_every": _EVERY})
    seconds: dict[int, float] = {}
    began: dict[int, float] = {}
    copies: list[float] = []
    writers: list[threading.Thread] = []
    last_log = 0.0

    def log(record: Record) -> None:
        nonlocal last_log
        step, now = int(record["step"]), time.perf_counter()
        seconds[step] = now - began.get(step, now)
        began[step + 1] = last_log = now

    with tempfile.TemporaryDirectory() as folder:

        def commit(step: int, write: Write | None) -> None:
            # Called with the copy made, right after the step's record.
            copies.append(time.perf_counter() - last_log)
            if write is not None and step < steps:
                writers.append(threading.Thread(target=write, args=(str(Path(folder) / str(step)),)))
                writers[-1].start()

        def same(model: nn.Module) -> nn.Module:
            return model

        worker = Worker(rank=0, num_workers=1, device=torch.device("cpu"), wrap=same, log=log, commit=commit)
        train(plan(config), worker)
        for writer in writers:
            writer.join()
    # The first steps warm up and the first copy takes its memory; a checkpoint is written within half its distance.
    quiet = [seconds[n] for n in range(3, steps + 1) if n < _EVERY or (n - 1) % _EVERY >= _EVERY // 2]
    step = statistics.median(quiet)
    extra = [
        sum(seconds[checkpoint + n] - step for n in range(1, _EVERY // 2 + 1))
        for checkpoint in range(_EVERY, steps, _EVERY)
    ]
    return {"step": quiet, "copy": copies[:-1], "extra": extra}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
