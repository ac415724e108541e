"""What a person can get wrong ends with one clear line and exit code 2 (1 when the world failed)."""

import os
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from runner import TINY, load_job

from pipeline import cli, storage
from pipeline.config import TrainConfig, to_flat
from pipeline.tracking import Tracker


def fails(job: str, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a job in this process; returns its exit code and its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run_job(load_job(job).main, list(words))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert isinstance(stop.value.code, int)
    return stop.value.code, lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedul", "cosine"], "--schedule"),
        (["--schedule", "cosin"], "'linear', 'cosine', 'quadratic', 'sigmoid'"),
        (["--T", "0"], "T"),
        (["--T", "many"], "--T"),
        (["--beta-start", "0.02", "--beta-end", "1e-4"], "beta_start=0.02"),
        (["--T", "20"], "beta_19"),
        (["--beta-end", "0.001"], "--allow-signal-at-T"),
        (["--batch-size", "65"], "multiple of --num-streams 16"),
        (["--num-workers", "17"], "at most --num-streams 16"),
        (["--image-size", "16", "--attention-resolutions", "8"], "holds 1x8x8 images"),
        (["--data", "nowhere"], "nowhere"),
        (["--sampling-steps", "5000"], "at most 1000"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--preset", "cifar"], "cifar10"),
        (["--dropout", "1.5"], "--dropout 1.5: must be in [0, 1)"),
    ],
)
def test_a_wrong_flag_of_train_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run_job(load_job("prepare_data").main, [])
    code, line = fails("train", *words, capsys=capsys)
    assert code == 2
    assert message in line
    assert not (Path(storage.home()) / "mlflow.db").exists()
    assert not (Path(storage.home()) / "runs").exists()


def test_a_half_written_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run_job(load_job("prepare_data").main, [])
    (Path(storage.home()) / "data" / "digits" / "manifest.json").unlink()
    code, line = fails("train", capsys=capsys)
    assert code == 2
    assert "prepare_data" in line


def test_an_image_that_is_no_image_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = load_job("prepare_data")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"not an image")
    from pipeline.config import PrepareConfig
    from pipeline.data.prepare import prepare
    from pipeline.data.sources import open_source
    from pipeline.errors import UserError

    with pytest.raises(UserError, match=r"broken\.png"):
        prepare(open_source(f"folder:{tmp_path / 'photos'}", image_size=8), PrepareConfig(), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert source.parse_arguments(["--source", "folder:x"]).config.source == "folder:x"


def test_an_unknown_source_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails("prepare_data", "--source", "digit", "--data", "x", capsys=capsys)
    assert code == 2
    assert "digits" in line
    assert "folder:" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: give one of --run, --pending, --checkpoint, --compare and --report (jobs/"),
        (
            ["--pending", "--run", "x"],
            "error: give one of --run, --pending, --checkpoint, --compare and --report (jobs/",
        ),
        (["--pending", "--experiment", "nothing"], "no experiment 'nothing'"),
        (["--run", "nobody"], "no run is called 'nobody'"),
        (["--pending", "--features", "inception"], "--inception-weights"),
    ],
)
def test_a_wrong_selection_of_evaluate_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Tracker().experiment("ddpm", create=True)
    code, line = fails("evaluate", *words, capsys=capsys)
    assert code == 2
    assert message in line


def test_inception_weights_with_the_wrong_sha256_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Tracker().experiment("ddpm", create=True)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"something else")
    words = ["--pending", "--features", "inception", "--inception-weights", str(weights)]
    code, line = fails("evaluate", *words, capsys=capsys)
    assert code == 2
    assert str(weights) in line
    assert "6726825d" in line


def test_an_mlflow_server_that_does_not_answer_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run_job(load_job("prepare_data").main, [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    code, line = fails("train", *TINY, capsys=capsys)
    assert code == 1
    assert "does not answer" in line
    assert "secret" not in line


def test_a_name_in_use_by_a_live_run_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Tracker()
    run = tracker.start_run("busy", experiment="ddpm", params=to_flat(TrainConfig()), tags={})
    from pipeline.errors import UserError
    from pipeline.tracking.ownership import Claim

    other = Claim(number=2, pid=os.getppid())
    tracker.client.log_param(run.run_id, other.key, other.to_json())

    with pytest.raises(UserError, match=r"'busy' is being written by a live driver"):
        tracker.start_run("busy", experiment="ddpm", params={}, tags={})
    assert capsys.readouterr().out == ""
