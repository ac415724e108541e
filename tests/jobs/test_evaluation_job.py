"""The evaluate job on one Ray cluster with real MLflow stores: killed, raced, limited, watched, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from clusters import Cluster, cluster
from publishing import prepare_digits, publish_run, write_model
from runner import ROOT, load_job

from pipeline.data.manifest import load_manifest
from pipeline.data.verify import verify
from pipeline.errors import UserError
from pipeline.evaluation.features import load_extractor
from pipeline.evaluation.selection import protocol_of, selected
from pipeline.tracking import Tracker, standing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLED_AT_CHUNK_8 = """
import os, runpy, signal
from pipeline.evaluation.gathering import Gathering

add = Gathering.add

def add_and_die(self, chunk):
    add(self, chunk)
    if self.next_chunk == 7:
        self.keep()  # how often it does so by itself depends on how fast the disk is
    if self.next_chunk == 8:
        os.kill(os.getpid(), signal.SIGKILL)

Gathering.add = add_and_die
runpy.run_path("jobs/evaluate.py", run_name="__main__")
"""
"""The job, killed from within: from outside, a quick one may be over before it is seen to have come so far."""

QUICK = ["--num-images", "40", "--chunk-size", "20", "--sampling-steps", "4"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A Ray head with two CPUs that all jobs of this module join."""
    with cluster(head_cpus=2) as found:
        yield found


@pytest.fixture
def job(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs the job in this process, which joins the cluster."""
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    prepare_digits()

    def run(*words: str) -> dict[str, Any]:
        result, text = load_job("evaluate").main(list(words))
        return {**result, "text": text}

    yield run
    ray.shutdown()


def spawn(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/evaluate.py", *words, "--json"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def points(run_id: str) -> list[tuple[int, float]]:
    """Steps and values of the run's distance."""
    history = Tracker().client.get_metric_history(run_id, "fd_efficientnet_lite0")
    return [(metric.step, metric.value) for metric in history]


def kept_chunks() -> int:
    """How many chunks an evaluation that goes on has kept; 0 if there is none."""
    for file in Path(os.environ["DDPM_HOME"], "evaluations").glob("*.safetensors"):
        data = file.read_bytes()
        return int(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["next_chunk"])
    return 0


def test_an_evaluation_killed_at_a_late_chunk_makes_only_the_missing_ones_and_gives_the_same_number(
    job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = publish_run(Tracker(), "killed", 10)
    words = ["--num-images", "190", "--chunk-size", "20", "--sampling-steps", "25"]
    of_run = ["--run", "killed", *words, "--save-images", "samples"]
    command = [sys.executable, "-c", KILLED_AT_CHUNK_8, *of_run, "--num-workers", "1"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (kept := kept_chunks()) in (7, 8)  # the eighth as well, where the disk is fast
    assert points(run_id) == []
    assert not Tracker().checkpoints("1")[0].results(), "half a result was left behind"
    with caplog.at_level("INFO"):
        (found,) = job(*of_run, "--num-workers", "2")["evaluated"]
    assert f"killed step 10: going on after {kept} chunks" in caplog.text
    assert points(run_id) == [(10, found["value"])]
    assert list(Path(os.environ["DDPM_HOME"], "evaluations").iterdir()) == []
    assert load_manifest(found["images"]).num_images == 190
    assert verify(found["images"]).faults == ()
    # The same weights without MLflow, by one worker and without a break: the same number and the same images.
    folder = Path(os.environ["DDPM_HOME"]) / "models" / "killed-10"
    alone = ["--checkpoint", str(folder), "--reference", "digits", "--save-images", "alone", "--num-workers", "1"]
    (whole,) = job(*alone, *words)["evaluated"]
    assert (whole["value"], whole["identity"]) == (found["value"], found["identity"])
    assert load_manifest(whole["images"]).digest == load_manifest(found["images"]).digest


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_two_evaluators_at_once_measure_each_checkpoint_once(
    store: str, job: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if store == "postgres":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("postgres_uri"))
    name, steps = f"raced-{store}", [10, 20, 30, 40]
    run_id = publish_run(Tracker(), name, *steps)
    words = ["--run", name, *QUICK, "--num-workers", "1"]
    processes = [spawn(*words) for _ in range(2)]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [json.loads(stdout) for stdout, _ in outputs]
    evaluated = [entry["step"] for result in found for entry in result["evaluated"]]
    assert sorted(evaluated) == steps, outputs
    assert sorted(step for step, _ in points(run_id)) == steps
    assert job("--run", name, *QUICK)["text"] == "nothing to do: every selected checkpoint has this result"


def damage(run: str, step: int) -> None:
    """Cuts a published checkpoint's weights off."""
    checkpoints = Tracker().checkpoints("1")
    (found,) = [entry for entry in checkpoints if (entry.run_name, entry.step) == (run, step)]
    os.truncate(Path(found.artifact_uri.removeprefix("file://")) / "ema.safetensors", 1000)


def rewrite_meta(run: str, **changes: object) -> None:
    """Makes a published checkpoint one that other code wrote."""
    (found,) = [entry for entry in Tracker().checkpoints("1") if entry.run_name == run]
    file = Path(found.artifact_uri.removeprefix("file://")) / "meta.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, **changes, "config": {**record["config"], **changes.pop("config", {})}}))


def fail_twice(run: str, *words: str) -> None:
    """Two evaluations that failed, by the protocol of a command."""
    config = load_job("evaluate").parse_arguments(list(words)).config
    extractor, tracker = load_extractor(config.protocol.features), Tracker()
    (candidate,) = [entry for entry in selected(config, tracker) if entry.checkpoint.run_name == run]
    identity = protocol_of(config, candidate, extractor).identity
    for _ in range(2):
        now = tracker.refresh(candidate.checkpoint)
        lease = tracker.take_lease(now, identity, standing(now, identity))
        assert lease is not None
        with lease:
            lease.fail("it was a bad day")


def reasons(result: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {entry["run"]: entry["reason"] for entry in result[kind]}


def test_what_cannot_be_measured_is_named_in_one_line_and_given_up_after_three_failures(job: Any) -> None:
    tracker = Tracker()
    for name in ("truncated", "newer", "other-network", "good"):
        publish_run(tracker, name, 10)
    publish_run(tracker, "not-finite", 10, noise=float("nan"))
    damage("truncated", 10)
    rewrite_meta("newer", format_version=99)
    rewrite_meta("other-network", config={"wings": 2})
    fail_twice("truncated", "--pending", *QUICK)
    result = job("--pending", *QUICK)
    assert [entry["run"] for entry in result["evaluated"]] == ["good"]
    failed = reasons(result, "failed")
    assert failed.keys() == {"truncated", "newer", "other-network", "not-finite"}
    assert "the network returned values that are not finite" in failed["not-finite"]
    assert "ema.safetensors is damaged" in failed["truncated"]
    assert "checkpoint format 99; this version reads 1" in failed["newer"]
    assert "was written by other code: unknown knob 'wings'" in failed["other-network"]
    assert result["exit_code"] == 1
    assert "note" in result["evaluated"][0]

    # Of those that are left, the one that has failed three times is given up, without a cluster.
    given_up = job("--run", "truncated", *QUICK)
    assert (given_up["evaluated"], given_up["failed"], given_up["exit_code"]) == ([], [], 0)
    reason = reasons(given_up, "skipped")["truncated"]
    assert reason.startswith("it failed 3 times (")
    assert "ema.safetensors is damaged" in reason
    assert reason.endswith("; --retry-failed tries again")
    again = job("--run", "truncated", *QUICK, "--retry-failed")
    assert "ema.safetensors is damaged" in reasons(again, "failed")["truncated"]


def test_a_wish_that_models_cannot_meet_skips_their_runs_before_anything_starts(job: Any) -> None:
    publish_run(Tracker(), "unconditional", 10, 20)
    result = job("--pending", *QUICK, "--guidance", "2")
    assert result["text"] == ("unconditional skipped: --guidance 2: the model has no classes (--num-classes 0); give 1")
    assert not ray.is_initialized()
    assert result["exit_code"] == 0
    with pytest.raises(UserError, match=r"^run 'unconditional': --guidance 2: the model has no classes"):
        job("--run", "unconditional", *QUICK, "--guidance", "2")


def test_a_model_folder_that_does_not_fit_its_reference_is_refused(job: Any, tmp_path: Path) -> None:
    location = str(Path(os.environ["DDPM_HOME"]) / "data" / "digits")
    write_model(
        tmp_path / "wide",
        name="wide",
        step=1,
        seed=0,
        location=location,
        image_size=16,
        image_channels=3,
        attention_resolutions=(8,),
    )
    words = ["--reference", "digits", *QUICK]
    with pytest.raises(UserError, match=r"digits holds images of 1x8x8, .*wide makes 3x16x16; give a data set"):
        job("--checkpoint", str(tmp_path / "wide"), *words)
    with pytest.raises(UserError, match=r"--checkpoint .*nothing is no model: give a folder with ema.safetensors"):
        job("--checkpoint", str(tmp_path / "nothing"), *words)


def test_the_newest_comes_first_within_the_limits_and_a_champion_and_a_report_follow(job: Any) -> None:
    run_id = publish_run(Tracker(), "limited", 10, 20)
    assert job("--pending", *QUICK, "--max-minutes", "0.0000001")["evaluated"] == []
    first = job("--pending", *QUICK, "--max-checkpoints", "1")
    assert [entry["step"] for entry in first["evaluated"]] == [20]
    assert "champion of ddpm: version 1, limited step 20 with fd_efficientnet_lite0" in first["champion"]
    rest = job("--pending", *QUICK)
    assert [entry["step"] for entry in rest["evaluated"]] == [10]
    note = "40 generated images for features of length 1280"
    assert note in rest["evaluated"][0]["note"]
    stored = [record["protocol"]["note"] for entry in Tracker().checkpoints("1") for record in entry.results().values()]
    assert [note in entry for entry in stored] == [True, True]
    # A sheet was logged for each checkpoint, since training had logged none.
    images = [file.path for file in Tracker().client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in images) == [10, 20]

    page = job("--report", "ddpm")
    text = Path(page["report"]).read_text()
    assert page["results"] == 2
    assert text.count("data:image/png;base64,") == 1
    logged = Tracker().client.download_artifacts(page["run_id"], "report.html")
    assert Path(logged).read_text() == text


def test_a_watch_measures_what_comes_and_an_interrupt_ends_it_cleanly(job: Any) -> None:
    tracker = Tracker()
    publish_run(tracker, "first", 10)
    watch = spawn("--pending", *QUICK, "--watch", "--interval", "1")
    try:
        deadline = time.monotonic() + 400

        def wait_for(run: str) -> None:
            while not any(entry.results() for entry in tracker.checkpoints("1") if entry.run_name == run):
                assert watch.poll() is None, watch.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.2)

        wait_for("first")
        publish_run(tracker, "second", 10)
        wait_for("second")
        watch.send_signal(signal.SIGTERM)  # not SIGINT, which a shell may have set to be ignored
        stdout, stderr = watch.communicate(timeout=400)
    finally:
        watch.kill()
    assert watch.returncode == 0, stderr
    assert [entry["run"] for entry in json.loads(stdout)["evaluated"]] == ["first", "second"]
    assert "Traceback" not in stderr


def test_a_schedule_that_fires_twice_finds_nothing_to_do_the_second_time(nodes: Cluster) -> None:
    """The entrypoint of cron, systemd and the CronJob."""
    prepare_digits()
    publish_run(Tracker(), "scheduled", 10)

    def tick(**environment: str) -> dict[str, Any]:
        lock = {"DDPM_LOCK": str(Path(os.environ["DDPM_HOME"]) / "tick.lock"), "DDPM_PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", "infra/schedules/evaluate.sh", *QUICK, "--json"],
            cwd=ROOT, env={**os.environ, **lock, **environment}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    assert [entry["run"] for entry in tick(**nodes.environment)["evaluated"]] == ["scheduled"]
    second = tick(RAY_ADDRESS="127.0.0.1:1")  # No cluster is there to be joined.
    assert (second["evaluated"], second["failed"], second["exit_code"]) == ([], [], 0)


def test_a_metric_asked_for_later_is_added_to_a_checkpoint_whose_other_results_stay(job: Any) -> None:
    run_id = publish_run(Tracker(), "measured", 10)
    words = ["--run", "measured", *QUICK]
    (first,) = job(*words)["evaluated"]
    every = ["--metrics", "fd", "fd-interval", "fd-infinity", "kid", "prdc"]
    (second,) = job(*words, *every)["evaluated"]
    assert (second["metric"], second["value"]) == ("fd_efficientnet_lite0", first["value"])
    names = second["metrics"].keys()
    assert {"kd_efficientnet_lite0", "precision_efficientnet_lite0", "fd_efficientnet_lite0_infinity"} <= names
    assert second["metrics"]["fd_efficientnet_lite0_low"] <= second["value"]
    assert second["value"] <= second["metrics"]["fd_efficientnet_lite0_high"]
    assert points(run_id) == [(10, first["value"])], "the distance was logged again"
    logged = Tracker().client.get_run(run_id).data.metrics
    assert {name: logged[name] for name in names} == second["metrics"]
    assert "nothing to do" in job(*words, *every)["text"]
    assert job(*words)["evaluated"] == []


def test_an_inception_score_of_other_features_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="--metrics is: efficientnet-lite0 tells no classes"):
        load_job("evaluate").main(["--run", "any", "--metrics", "is"])


def test_bits_per_dimension_come_from_held_out_images_and_the_same_ones_for_two_workers(job: Any) -> None:
    run_id = publish_run(Tracker(), "likely", 10)
    publish_run(Tracker(), "again", 10)
    words = ["--metrics", "bpd", "--held-out", "digits", "--bound-images", "120", "--bound-stride", "250", *QUICK]
    (first,) = job("--run", "likely", *words)["evaluated"]
    (second,) = job("--run", "again", *words, "--num-workers", "2")["evaluated"]
    assert first["metrics"] == second["metrics"]
    assert first["metric"] == "bpd"
    parts = [first["metrics"][f"bpd_{name}"] for name in ("prior", "decoder", "steps")]
    assert first["value"] == pytest.approx(sum(parts))
    client = Tracker().client
    assert client.get_run(run_id).data.metrics["bpd"] == first["value"]
    assert [file.path for file in client.list_artifacts(run_id, "likelihood")] == ["likelihood/step-00000010.csv"]
    assert "nothing to do" in job("--run", "likely", *words)["text"]
    assert job("--run", "likely", *words, "--bound-images", "100")["evaluated"], "another number of images"
