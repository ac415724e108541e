"""``infra/schedules``: the evaluation on one machine, by cron or systemd, runs a command that the job understands."""

import configparser
import shutil
import subprocess

import pytest
from infra_files import IMAGE_PROJECT, INFRA, parsed

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


def test_the_cron_command_is_understood_and_measures_what_is_pending() -> None:
    path, config = parsed(cron_line()[6])
    assert path == "jobs/evaluate.py"
    assert config.pending


def test_cron_never_runs_two_evaluations_at_the_same_time() -> None:
    assert "flock --nonblock" in cron_line()[6]


def test_the_cron_line_has_a_time_and_a_user_and_no_percent_sign() -> None:
    fields = cron_line()
    assert all(set(field) <= set("0123456789*/,-") for field in fields[:5])
    assert fields[5] == "ddpm"
    assert "%" not in fields[6], "cron reads it as a line break"


def test_the_systemd_command_is_understood_and_measures_what_is_pending() -> None:
    path, config = parsed(unit("ddpm-evaluate.service")["Service"]["ExecStart"])
    assert path == "jobs/evaluate.py"
    assert config.pending


def test_both_schedules_run_the_same_evaluation_in_the_same_place() -> None:
    service = unit("ddpm-evaluate.service")["Service"]
    assert parsed(cron_line()[6]) == parsed(service["ExecStart"])
    assert service["WorkingDirectory"] == IMAGE_PROJECT
    assert f"cd {IMAGE_PROJECT} " in cron_line()[6]
    assert f". {service['EnvironmentFile']} " in cron_line()[6]


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
