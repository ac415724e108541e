"""Measurements without Ray: the same function in a thread, or one that the test ends by hand."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.training.quality_task import Job, Measured, run

_POOL = ThreadPoolExecutor()


class Thread:
    """Runs a measurement in a thread of this process."""

    def __init__(self, job: Job, num_gpus: float) -> None:
        self._future = _POOL.submit(run, job)

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Measured:
        return self._future.result()

    def cancel(self) -> None:
        self._future.cancel()


class ByHand:
    """Starts nothing: the test says when a measurement is done and what comes of it."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.futures: dict[int, Future[Measured]] = {}

    def __call__(self, job: Job, num_gpus: float) -> "_Handle":
        self.started.append(job.step)
        self.futures[job.step] = Future()
        return _Handle(self, job.step)

    def end(self, step: int, *, distance: float | None = None, problem: str | None = None) -> None:
        """Ends a measurement with a white sheet."""
        sheet = np.full((1, 4, 4), 255, dtype=np.uint8)
        self.futures[step].set_result(Measured(step=step, sheet=sheet, distance=distance, problem=problem))


class _Handle:
    def __init__(self, owner: ByHand, step: int) -> None:
        self._owner, self._step = owner, step

    def done(self) -> bool:
        return self._owner.futures[self._step].done()

    def result(self) -> Measured:
        return self._owner.futures[self._step].result()

    def cancel(self) -> None:
        self._owner.cancelled.append(self._step)
