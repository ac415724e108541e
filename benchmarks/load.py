"""What one MLflow server takes, and what planning costs on 1,024 workers: ``python benchmarks/load.py --help``.

Start the services (``make services``) and ``source`` the writer's file first: MLflow over PostgreSQL, artifacts in S3.
The writers write as training does, by the same code, without training. What MLflow holds is counted at the end.
"""

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from planning import synthetic_manifest
from report import machine, markdown
from torch.distributed import TCPStore

from pipeline.data.order import StreamOrder, streams_of_rank
from pipeline.tracking import Tracker, results
from pipeline.tracking.runs import TrackedRun

_EXPERIMENT = "load"
_KEYS = ("train/loss", "train/grad_norm", "train/lr", "perf/images_per_second", "perf/data_wait_ratio", "perf/step_ms")
_STEPS = (0, 1_000_000)
_PARAMS = {f"knob_{number}": number for number in range(60)}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes to MLflow as training runs, a sweep and 200 trials do, and plans for 1,024 workers."""

    what: tuple[Literal["runs", "trials", "planning", "rendezvous"], ...] = ("runs", "trials", "planning", "rendezvous")
    """Which measurements to make."""
    runs: int = 8
    """Training runs that write at the same time."""
    minutes: float = 3.0
    """How long they write."""
    window_seconds: float = 1.0
    """Time between two records of a run; training with --log-every 50 takes longer for one."""
    windows_per_checkpoint: int = 30
    """Records between two published checkpoints."""
    checkpoint_bytes: int = 2_800_000
    """Size of a published checkpoint; that of the digits preset."""
    trials: int = 200
    """Trials that write to one server."""
    trials_at_once: int = 8
    """Of these at the same time."""
    shards: int = 100_000
    """Shards to plan for, of 1,000 images."""
    ranks: int = 1024
    """Workers to plan for, all of them."""
    out: Path | None = None
    """File for all measurements, as JSON."""


@dataclass(kw_only=True)
class Writer:
    """One run that writes; what each kind of call took, in seconds."""

    run: TrackedRun
    checkpoint: Path
    calls: dict[str, list[float]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)

    def timed(self, name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.calls.setdefault(name, []).append(time.perf_counter() - started)

    def window(self, step: int) -> None:
        """One logging window of training."""
        record = {"step": step, **dict.fromkeys(_KEYS, 1.0 / (step + 1))}
        self.timed("a record", lambda: self.run.log_metrics([record]))
        self.run.heartbeat()
        self.steps.append(step)

    def publish(self, step: int) -> None:
        """One checkpoint with its sample sheet."""
        self.timed("a checkpoint", lambda: self.run.publish(self.checkpoint, step, {}))
        self.timed("a sheet", lambda: self.run.log_grid(np.zeros((64, 64, 1), dtype=np.uint8), step))
        self.published.append(step)

    def lost(self) -> int:
        """Values, checkpoints and sheets that MLflow has not, or has twice."""
        client, run_id = self.run._client, self.run.run_id
        published = set(self.published)
        count = len(published ^ self.run.published_steps()) + len(published ^ set(results.sheet_steps(client, run_id)))
        for key in _KEYS:
            kept, wanted = (
                Counter(metric.step for metric in client.get_metric_history(run_id, key)),
                Counter(self.steps),
            )
            count += (kept - wanted).total() + (wanted - kept).total()
        return count


def main(arguments: Arguments) -> None:
    """Measures and prints the tables."""
    facts, record = machine(), {}
    stamp = f"{int(time.time())}"
    if "runs" in arguments.what:
        record["runs"] = _measure_runs(arguments, stamp)
        print(_table(f"{arguments.runs} runs and a sweep, {arguments.minutes:g} minutes", record["runs"], facts))
    if "trials" in arguments.what:
        record["trials"] = _measure_trials(arguments, stamp)
        print(_table(f"{arguments.trials} trials", record["trials"], facts))
    if "planning" in arguments.what:
        record["planning"] = _measure_planning(arguments)
        print(json.dumps(record["planning"]))
    if "rendezvous" in arguments.what:
        record["rendezvous"] = _measure_rendezvous(arguments)
        print(json.dumps(record["rendezvous"]))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": facts, **record}, indent=2) + "\n")


def _measure_runs(arguments: Arguments, stamp: str) -> dict[str, Any]:
    started = time.monotonic()
    with _pool(arguments.runs + 1) as pool:
        names = [f"load-{stamp}-{number}" for number in range(arguments.runs)]
        runs = [pool.submit(_train, name, arguments) for name in names]
        sweep = pool.submit(_sweep, f"load-{stamp}-sweep", arguments)
        done = [run.result() for run in runs] + sweep.result()
    return _sum(done, time.monotonic() - started)


def _measure_trials(arguments: Arguments, stamp: str) -> dict[str, Any]:
    started = time.monotonic()
    parent = Tracker().start_run(f"trials-{stamp}", experiment=_EXPERIMENT, params={}, tags={})
    with _pool(arguments.trials_at_once) as pool:
        names = [f"trials-{stamp}-{number}" for number in range(arguments.trials)]
        done = list(pool.map(_trial, names, [parent.run_id] * len(names), [arguments.checkpoint_bytes] * len(names)))
    parent.finish("FINISHED")
    return _sum(done, time.monotonic() - started)


def _measure_planning(arguments: Arguments) -> dict[str, Any]:
    """All ranks plan some steps of a large data set; what one does alone is timed for a few."""
    sizes = synthetic_manifest(arguments.shards, 1000).shard_sizes
    batch_size = 4 * arguments.ranks
    numbers = {"shard_sizes": sizes, "batch_size": batch_size, "num_streams": arguments.ranks, "seed": 0}
    alone = []
    for rank in range(0, arguments.ranks, max(1, arguments.ranks // 16)):
        started = time.perf_counter()
        StreamOrder(**numbers).locate(_STEPS[-1], streams_of_rank(arguments.ranks, rank, arguments.ranks))
        alone.append(time.perf_counter() - started)
    order, started = StreamOrder(**numbers), time.perf_counter()
    for step in _STEPS:
        images: set[tuple[int, int]] = set()
        for rank in range(arguments.ranks):
            shards, indices = order.locate(step, streams_of_rank(arguments.ranks, rank, arguments.ranks))
            images |= set(zip(shards.tolist(), indices.tolist(), strict=True))
        assert len(images) == batch_size, "all workers together read every image of the batch once"
    together = (time.perf_counter() - started) / len(_STEPS) / arguments.ranks
    return {"alone_ms": 1000 * statistics.median(alone), "longest_ms": 1000 * max(alone), "next_ms": 1000 * together}


def _measure_rendezvous(arguments: Arguments) -> dict[str, Any]:
    """All ranks meet at torch's store, as they do before the first step: say where they are and wait for the last."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Connecting asks for the peer's name first, and a machine without a name server waits for that.
    connected = threading.Barrier(arguments.ranks)
    starts: list[float] = []

    def meet(rank: int) -> float:
        mine = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        connected.wait()
        starts.append(time.perf_counter())
        mine.set(f"rank-{rank}", "10.0.0.1:12345")
        if mine.add("here", 1) == arguments.ranks:
            mine.set("go", "1")
        mine.wait(["go"])
        return time.perf_counter()

    with ThreadPoolExecutor(arguments.ranks) as pool:
        ends = list(pool.map(meet, range(arguments.ranks)))
    return {"ranks": arguments.ranks, "seconds": max(ends) - min(starts)}


def _train(name: str, arguments: Arguments) -> dict[str, Any]:
    """A training run's worth of writing, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        writer = _writer(name, folder, arguments.checkpoint_bytes)
        step, end = 0, time.time() + 60 * arguments.minutes
        while time.time() < end:
            next_window = time.time() + arguments.window_seconds
            step += 1
            writer.window(step)
            if step % arguments.windows_per_checkpoint == 0:
                writer.publish(step)
            time.sleep(max(0.0, next_window - time.time()))
        writer.run.finish("FINISHED")
        return {
            "calls": writer.calls,
            "lost": writer.lost(),
            "records": len(writer.steps),
            "published": len(writer.published),
        }


def _sweep(name: str, arguments: Arguments) -> list[dict[str, Any]]:
    """Trials one after the other, as a sweep on a busy cluster."""
    parent = _tracker().start_run(name, experiment=_EXPERIMENT, params={}, tags={})
    done, end = [], time.time() + 60 * arguments.minutes
    while time.time() < end:
        done.append(_trial(f"{name}-{len(done)}", parent.run_id, arguments.checkpoint_bytes))
    parent.finish("FINISHED")
    return done


def _trial(name: str, parent_run_id: str, checkpoint_bytes: int) -> dict[str, Any]:
    """A short run: ten records and a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        writer = _writer(name, folder, checkpoint_bytes, parent_run_id)
        for step in range(1, 11):
            writer.window(step)
        writer.publish(10)
        writer.run.finish("FINISHED")
        return {"calls": writer.calls, "lost": writer.lost(), "records": 10, "published": 1}


def _writer(name: str, folder: str, checkpoint_bytes: int, parent_run_id: str | None = None) -> Writer:
    (Path(folder) / "ema.safetensors").write_bytes(np.random.default_rng(0).bytes(checkpoint_bytes))
    started = time.perf_counter()
    run = _tracker().start_run(name, experiment=_EXPERIMENT, params=_PARAMS, tags={}, parent_run_id=parent_run_id)
    return Writer(run=run, checkpoint=Path(folder), calls={"a start": [time.perf_counter() - started]})


_trackers: list[Tracker] = []


def _tracker() -> Tracker:
    if not _trackers:
        _trackers.append(Tracker())
    return _trackers[0]


def _pool(size: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"))


def _sum(done: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    calls: dict[str, list[float]] = {}
    for entry in done:
        for name, values in entry["calls"].items():
            calls.setdefault(name, []).extend(values)
    found: dict[str, Any] = {"seconds": seconds, "runs": len(done), "calls": calls}
    return found | {name: sum(entry[name] for entry in done) for name in ("lost", "records", "published")}


def _table(title: str, found: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = []
    for name, values in found["calls"].items():
        ordered = sorted(values)
        shown = (statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])
        rows.append((name, f"{len(values):,}", *(f"{1000 * value:,.0f}" for value in shown)))
    counts = f"{found['runs']} runs, {found['records']:,} records, {found['published']} checkpoints"
    head = f"{title}: {counts} in {found['seconds']:.0f} s, lost: {found['lost']}"
    return f"{head}\n\n{markdown(('call', 'number', 'median ms', '99 % ms', 'longest ms'), rows, facts)}\n"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
