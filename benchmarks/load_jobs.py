"""Eight training jobs and a sweep on one cluster and one MLflow server: ``python benchmarks/load_jobs.py --help``.

Start the services (``make services``) and ``source`` the writer's file first. Unlike ``load.py`` this trains: every job
is a process of its own, with its workers on one Ray cluster that is started here. What MLflow holds is counted at the
end.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from mlflow import MlflowClient
from mlflow.entities import Run
from report import machine, markdown

_ROOT = Path(__file__).resolve().parents[1]
_EXPERIMENT = "load-jobs"
_DISTANCE = "fd_efficientnet_lite0"
_RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
_START_SECONDS = 90.0
_NICE = ["sh", "-c", '{ echo 10 > /proc/self/autogroup; } 2>/dev/null; exec nice -n 19 "$@"', "sh"]
"""The servers have a machine of their own elsewhere; here they are served first.

Where the kernel shares time among sessions (autogroup), ``nice`` counts within one of them only, so each command is a
session of its own that stands behind. Linux 6.18 gave MLflow no time at all for up to 80 s while the session of Ray's
workers was busy, niced as they were.
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trains and sweeps at the same time and compares what MLflow holds with what was done."""

    jobs: int = 8
    """Training jobs at the same time."""
    steps: int = 1500
    """Steps of each."""
    start_seconds: float = 20.0
    """Between the starts of two jobs: one start is a dozen processes, and two cores cannot bear all of them at once."""
    log_every: int = 5
    """Steps between two records of a job; far more records than a real run writes."""
    checkpoint_every: int = 250
    """Steps between two published checkpoints."""
    trial_steps: int = 200
    """Steps of each of the sweep's six trials."""
    out: Path | None = None
    """File for all that was found, as JSON."""

    def __post_init__(self) -> None:
        if self.steps % self.checkpoint_every or self.checkpoint_every % self.log_every:
            raise SystemExit("--steps must be a multiple of --checkpoint-every, and that one of --log-every")


def main(arguments: Arguments) -> int:
    """Runs all and prints the table; 1 if anything is lost, twice or failed."""
    facts, stamp = machine(), f"{int(time.time())}"
    with _cluster(num_cpus=arguments.jobs + 3) as environment:
        subprocess.run(_job("prepare_data"), cwd=_ROOT, env=environment, check=True, capture_output=True)
        started = time.monotonic()
        names = [f"job-{stamp}-{number}" for number in range(arguments.jobs)]
        sweep = f"sweep-{stamp}"
        commands = {**{name: _train(name, arguments) for name in names}, sweep: _tune(sweep, arguments)}
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name, command in commands.items():
                running[name] = _start(command, environment)
                time.sleep(arguments.start_seconds)
            codes = {name: process.wait() for name, process in running.items()}
        finally:
            for process in running.values():
                process.terminate()  # nothing happens to those that have ended
        seconds = time.monotonic() - started
    rows = _found(arguments, names, sweep, codes)
    print(
        markdown(("", "runs", "records wanted", "lost", "twice", "checkpoints wanted", "lost", "failed"), rows, facts)
    )
    together = _seconds_together(names, sweep)
    print(f"\n{arguments.jobs} jobs and a sweep: {seconds:.0f} s, {together:.0f} s of them all at once.")
    if arguments.out is not None:
        found = {"machine": facts, "seconds": seconds, "seconds_all_at_once": together, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(value != "0" for row in rows for value in (row[3], row[4], row[6], row[7])))


@contextmanager
def _cluster(*, num_cpus: int) -> Iterator[dict[str, str]]:
    """A Ray head of its own with more logical CPUs than the machine has; yields its clients' environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0"}
    environment |= {"RAY_prestart_worker_first_driver": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = ["start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        words += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000", "--include-dashboard=false"]
        with (Path(folder) / "head.log").open("wb") as log:
            head = subprocess.Popen(
                [*_NICE, *_RAY, *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait_for_port(port, head)
            yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise SystemExit("the Ray head did not come up")


def _job(name: str, *words: str) -> list[str]:
    return [sys.executable, f"jobs/{name}.py", *words]


def _start(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    words = [*_NICE, *command]
    return subprocess.Popen(words, cwd=_ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def _small(arguments: Arguments) -> list[str]:
    """A network that leaves the machine time for everything else."""
    words = ["--preset", "digits", "--base-channels", "8", "--num-workers", "1", "--experiment", _EXPERIMENT]
    words += ["--log-every", str(arguments.log_every), "--quality-images", "0", "--sampling-steps", "10"]
    # On an overloaded machine the driver copies a checkpoint seconds after it was committed: none may be gone by then.
    return [*words, "--grid-images", "4", "--keep-checkpoints", "8", "--json"]


def _train(name: str, arguments: Arguments) -> list[str]:
    words = ["--steps", str(arguments.steps), "--checkpoint-every", str(arguments.checkpoint_every), "--name", name]
    return _job("train", *_small(arguments), *words)


def _tune(name: str, arguments: Arguments) -> list[str]:
    words = ["--steps", str(arguments.trial_steps), "--checkpoint-every", str(arguments.trial_steps), "--name", name]
    words += ["--schedules", "linear", "cosine", "--Ts", "100", "300", "1000", "--num-images", "50"]
    words += ["--max-concurrent-trials", "2"]
    return _job("tune", *_small(arguments), *words, "--chunk-size", "50")


def _found(arguments: Arguments, names: list[str], sweep: str, codes: dict[str, int]) -> list[list[str]]:
    """Rows of the table: what was wanted, and how much of it MLflow lacks or has twice."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(_EXPERIMENT).experiment_id
    parent = _named(client, experiment, sweep)
    children = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'" if parent else ""
    trials = [run for run in client.search_runs([experiment], children) if run.data.params] if parent else []
    jobs = [run for name in names if (run := _named(client, experiment, name))]
    train = _row(client, arguments.jobs, jobs, arguments.steps, arguments.checkpoint_every, arguments.log_every)
    failed = int(codes[sweep] != 0) + sum(_DISTANCE not in trial.data.metrics for trial in trials) + 6 - len(trials)
    steps = arguments.trial_steps
    tune = _row(client, 6, trials, steps, steps, arguments.log_every)
    return [
        ["training jobs", *train, str(sum(codes[name] != 0 for name in names))],
        ["trials of a sweep", *tune, str(failed)],
    ]


def _seconds_together(names: list[str], sweep: str) -> float:
    """From the first record of the last job to the end of the first that ended, by MLflow's clock."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(_EXPERIMENT).experiment_id
    runs = [run for name in (*names, sweep) if (run := _named(client, experiment, name))]
    losses = [client.get_metric_history(run.info.run_id, "train/loss") for run in runs if run.info.run_name != sweep]
    if len(runs) <= len(names) or not all(losses) or not all(run.info.end_time for run in runs):
        return 0.0  # one of them did not get to its end
    return max(0.0, (min(run.info.end_time for run in runs) - max(loss[0].timestamp for loss in losses)) / 1000)


def _named(client: MlflowClient, experiment: str, name: str) -> Run | None:
    # A request to create a run that the busy server answers too late is sent again and leaves an empty run behind.
    found = [run for run in client.search_runs([experiment], f"attributes.run_name = '{name}'") if run.data.params]
    return found[0] if found else None


def _row(client: MlflowClient, count: int, runs: list[Run], steps: int, every: int, log_every: int) -> list[str]:
    """Counts of so many runs; one that is not there has lost everything."""
    wanted = set(range(log_every, steps + 1, log_every))
    checkpoints = {str(step) for step in range(every, steps + 1, every)}
    missing = count - len(runs)
    lost, twice, unpublished = missing * len(wanted), 0, missing * len(checkpoints)
    for run in runs:
        kept = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        lost, twice = lost + len(wanted - set(kept)), twice + len(kept) - len(set(kept))
        models: Any = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        unpublished += len(checkpoints - {model.tags["step"] for model in models})
    counts = [len(runs), count * len(wanted), lost, twice, count * len(checkpoints), unpublished]
    return [f"{number:,}" for number in counts]


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments, description=__doc__)))
