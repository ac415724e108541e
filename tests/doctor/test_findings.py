"""What the doctor finds on this machine, in words that a person can act on and that hold no secret."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.doctor import machine, servers, stores
from pipeline.doctor.finding import fail, guarded, ok, redact, warn
from pipeline.doctor.session import Examination
from pipeline.errors import WorldError


def test_it_exits_with_1_exactly_if_a_job_would_fail() -> None:
    fine = [ok("disk", "empty"), warn("clock", "late", "set it")]
    assert Examination(findings=fine).exit_code == 0
    assert Examination(findings=[*fine, fail("ray", "gone", "start it")]).exit_code == 1


def test_a_line_says_what_to_mend_and_json_says_the_same() -> None:
    found = Examination(findings=[fail("ray", "gone", "start it")])
    assert found.text() == "fail  ray        gone -> start it"
    assert found.to_json()["findings"] == [{"check": "ray", "state": "fail", "text": "gone", "mend": "start it"}]


def test_secrets_of_the_environment_are_in_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/ray/token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/as+some/keys")
    assert redact("the key /as+some/keys") == "the key ***"
    found = Examination(findings=[fail("mlflow", "correct-horse at /etc/ray/token", "correct-horse?")])
    assert "correct-horse" not in found.text()
    assert "correct-horse" not in str(found.to_json())
    assert "/etc/ray/token" in found.text()
    assert redact("nothing to hide") == "nothing to hide"


def test_an_error_of_one_check_is_one_line_and_does_not_hide_the_others() -> None:
    def broken() -> list[object]:
        raise WorldError("no answer\nTraceback")

    def bug() -> list[object]:
        raise KeyError("Alive")

    (known,), (unknown,) = guarded("x", "mend", broken), guarded("x", "mend", bug)  # type: ignore[arg-type]
    assert (known.state, known.text, known.mend) == ("fail", "no answer", "mend")
    assert unknown.text.startswith("KeyError")


def test_packages_that_are_not_as_pinned_or_missing_are_named(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==0.1\nray==0.2\n# a comment\n")
    (finding,) = machine.packages([tmp_path])
    assert finding.state == "warn"
    assert "numpy" in finding.text
    assert "(0.1)" in finding.text


def test_an_installed_image_is_compared_with_the_file_of_its_working_directory_and_nothing_is_not_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "site-packages", Path()]
    monkeypatch.chdir(tmp_path)
    (unknown,) = machine.packages(folders)
    assert (unknown.state, "no constraints.txt" in unknown.text) == ("warn", True)
    (tmp_path / "constraints.txt").write_text("numpy==0.1\n")
    (known,) = machine.packages(folders)
    assert "(0.1)" in known.text


def test_packages_of_an_installed_package_are_compared_with_the_file_above_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.txt").write_text("numpy==0.1\n")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "pipeline" / "doctor" / "machine.py"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "jobs" / "doctor.py")])
    assert "(0.1)" in machine.packages()[0].text


def test_this_environment_is_as_pinned() -> None:
    assert [finding.state for finding in machine.packages()] == ["ok"]


@pytest.mark.parametrize(
    ("free", "state"), [(50, "fail"), (60, "warn"), (900, "ok")], ids=["96 percent full", "little room", "room"]
)
def test_a_full_disk_is_found_before_ray_refuses_work(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = machine.GIB if state != "warn" else machine.GIB // 15
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1100 * gib, free=free * gib))
    assert machine.disk(Path("/not/there/yet")).state == state


def test_little_shared_memory_is_a_warning_and_none_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.shared_memory(tmp_path / "no-shm")[0].state == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**26, free=2**26))
    (finding,) = machine.shared_memory(tmp_path)
    assert finding.state == "warn"
    assert "--shm-size" in finding.mend


@pytest.mark.parametrize(("offset", "state"), [(0.6, "ok"), (-20.0, "warn"), (61.0, "fail"), (-3600.0, "fail")])
def test_a_clock_that_differs_is_a_warning_and_by_a_minute_a_failure(offset: float, state: str) -> None:
    assert stores.clock("S3", offset).state == state


def test_storage_on_this_machine_is_written_read_listed_and_left_empty(tmp_path: Path) -> None:
    (finding,) = stores.storage_serves()
    assert finding.state == "ok"
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_without_a_dashboard_there_is_nothing_to_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert servers.ray_dashboard() == []


def test_torch_works_here() -> None:
    assert [finding.state for finding in machine.torch_devices()] == ["ok"]
