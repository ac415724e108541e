"""MLflow that is away or busy at a moment when nothing can go on without it."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline import storage
from pipeline.config import EvaluateConfig, TrainConfig, TuneConfig
from pipeline.errors import UserError, WorldError
from pipeline.storage import UnreachableError
from pipeline.sweep import trial_run
from pipeline.sweep.points import Listed, open_source
from pipeline.sweep.record import Ended
from pipeline.sweep.space import Trial
from pipeline.sweep.trial_run import ENDED, GOES_ON, OBJECTIVE, STEP, TrialPlan, run_trial
from pipeline.tracking import Tracker
from pipeline.tracking.outages import patient_requests


@dataclass
class Server:
    """Answers ``status`` to so many requests, then as an MLflow server without experiments."""

    refusals: int = 0
    status: int = 503
    timeouts: list[str] = field(default_factory=list)
    """What MLflow's client was told at each request, as the environment of this process says."""
    uri: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.timeouts.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
            self.send_response(state.status if state.refusals > 0 else 200)
            state.refusals -= 1
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state.uri = f"http://127.0.0.1:{running.server_address[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", state.uri)
    yield state
    running.shutdown()
    running.server_close()


def test_a_person_is_told_at_once_and_a_trial_waits(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.refusals = 3
    with pytest.raises(UnreachableError, match="does not answer"):
        Tracker()
    Tracker(patience_seconds=60)
    assert server.refusals < 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("MLflow is unreachable since ")


def test_a_start_waits_longer_than_what_is_done_in_passing(server: Server) -> None:
    tracker = Tracker()
    server.timeouts.clear()
    assert tracker.find_run("none") is None
    assert set(server.timeouts) == {"15"}
    server.timeouts.clear()
    with pytest.raises(UserError, match="deleted"):  # this server knows nothing of any experiment
        tracker.start_run("run", experiment="new", params={}, tags={})
    assert set(server.timeouts) == {"60"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "15"


def test_the_environment_has_the_last_word_on_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with patient_requests():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "4"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


def test_an_outage_is_told_from_a_refusal(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker()
    server.refusals = 10
    with pytest.raises(UnreachableError, match="MLflow refused or is away"):
        tracker.run_names()
    server.status = 400
    with pytest.raises(WorldError, match="MLflow refused or is away") as refusal:
        tracker.run_names()
    assert not isinstance(refusal.value, UnreachableError)


@pytest.fixture
def plan(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> TrialPlan:
    """Of a sweep with rungs at steps 10 and 20, without pauses."""
    monkeypatch.setattr(trial_run, "_FIRST_PAUSE_SECONDS", 0.0)
    evaluation = EvaluateConfig(run="s")
    return TrialPlan(
        sweep="s", run_id="0", base=TrainConfig(), evaluation=evaluation, rungs=(10, 20), rung_images=8, ways=()
    )


def test_a_trial_survives_outages_and_reports_each_rung_once(
    plan: TrialPlan, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_rungs: list[int] = []
    ends = iter([UnreachableError("away"), UnreachableError("away"), Ended(status="finished", step=30, value=2.0)])

    def at_rung(_plan: TrialPlan, _trial: Trial, _tracker: Tracker, step: int) -> float:
        at_rungs.append(step)
        if at_rungs == [10, 20]:
            raise UnreachableError("away")
        return float(step)

    def to_the_end(*_: object) -> Ended:
        if isinstance(end := next(ends), Exception):
            raise end
        return end

    monkeypatch.setattr(trial_run, "_at_rung", at_rung)
    monkeypatch.setattr(trial_run, "_to_the_end", to_the_end)
    reports = list(run_trial(plan, trial))
    assert at_rungs == [10, 20, 20]
    assert reports[:2] == [{STEP: step, OBJECTIVE: float(step), GOES_ON: False} for step in (10, 20)]
    assert (reports[2][ENDED]["status"], reports[2][OBJECTIVE]) == ("finished", 2.0)
    assert len(reports) == 3


def test_a_trial_gives_up_after_six_outages_in_one_line(
    plan: TrialPlan, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def at_rung(*_: object) -> float:
        tries.append(0)
        raise UnreachableError("MLflow refused\nor is away")

    monkeypatch.setattr(trial_run, "_at_rung", at_rung)
    (report,) = run_trial(plan, trial)
    assert len(tries) == 6
    assert (report[ENDED]["status"], report[ENDED]["error"]) == ("failed", "MLflow refused or is away")


@pytest.fixture
def trial() -> Trial:
    """The first of a sweep over one schedule."""
    source = open_source(TuneConfig(schedules=("linear",), Ts=(100,)))
    assert isinstance(source, Listed)
    return source.points[0].trials(TuneConfig())[0]


def test_storage_is_what_patience_says_it_waits_for_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([UnreachableError("away"), None])

    def ask() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "here"

    assert storage.patiently("s3://bucket", 5, ask) == "here"
    assert caplog.records[0].getMessage().startswith("storage is unreachable since ")
