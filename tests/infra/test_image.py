"""``infra/image``: one pinned image that is not root and holds what the manifests start."""

import re

from infra_files import IMAGE_PROJECT, INFRA, ROOT, manifest, parsed

TEXT = (INFRA / "image" / "Dockerfile").read_text()
IGNORE = (INFRA / "image" / "Dockerfile.dockerignore").read_text().split("\n")


def instructions(name: str) -> list[str]:
    """The arguments of an instruction, in order, continued lines joined."""
    return re.findall(rf"^{name} (.+)$", TEXT.replace("\\\n", " "), re.MULTILINE)


def copied() -> list[str]:
    return [word.rstrip("/") for line in instructions("COPY") for word in line.split()[:-1]]


def test_it_ends_as_a_user_that_kubernetes_can_see_is_not_root() -> None:
    user = instructions("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0
    pod = manifest("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert int(user) == pod["securityContext"]["runAsUser"]


def test_its_base_is_pinned_and_can_be_replaced() -> None:
    assert instructions("FROM") == ["${BASE}"]
    (base,) = (argument.partition("=")[2] for argument in instructions("ARG") if argument.startswith("BASE="))
    assert re.search(r":\d+\.\d+\.\d+", base)


def test_it_installs_pinned_versions_only() -> None:
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)


def test_it_copies_files_that_exist_and_that_the_build_can_see() -> None:
    allowed = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert "*" in IGNORE
    assert set(copied()) == allowed
    assert all((ROOT / name).exists() for name in copied())


def test_the_job_of_every_command_is_at_its_place_in_the_image() -> None:
    assert instructions("WORKDIR") == [IMAGE_PROJECT]
    assert "COPY jobs ./jobs" in TEXT
    assert (ROOT / parsed(manifest("RayJob")["spec"]["entrypoint"])[0]).is_file()


def test_it_records_the_commit_for_results() -> None:
    assert 'DDPM_GIT_COMMIT=""' in instructions("ARG")
    assert any("DDPM_GIT_COMMIT=${DDPM_GIT_COMMIT}" in line for line in instructions("ENV"))
    assert "DDPM_GIT_COMMIT" in (ROOT / "pipeline" / "provenance.py").read_text()


def test_login_shells_find_its_programs() -> None:
    (line,) = (line for line in instructions("RUN") if "venv" in line)
    assert "/etc/profile.d/" in line
    assert "/home/ray/.bashrc" in line
