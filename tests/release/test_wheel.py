"""The package as users get it: a wheel that is whole, installs, and needs Ray and MLflow only where they are used."""

import ast
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("diffusion", "interop")
    for path in sorted((ROOT / "pipeline" / folder).glob("[a-z]*.py"))
]
# Anything outside torch that the mathematics (and, for models of others, the formats) could do without.
BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
"""
HEAVY = {"ray", "mlflow", "webdataset", "boto3", "botocore", "pyarrow", "sklearn", "imagecodecs", "diffusers", "tqdm"}


def python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a folder where only ``path`` is on the path besides the libraries, in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=path.parent, env={"PYTHONPATH": str(path)}, capture_output=True, text=True)


def blocked(names: set[str]) -> str:
    return BLOCKER.format(blocked=repr(names))


def test_the_mathematics_and_the_formats_of_others_need_neither_ray_nor_mlflow_nor_webdataset():
    assert len(MODULES) > 20
    done = python(f"{blocked(HEAVY)}\nimport {', '.join(MODULES)}", ROOT)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    done = python(f"{blocked(HEAVY)}\nimport ray", ROOT)
    assert "is blocked" in done.stderr


def test_a_network_trains_and_samples_with_torch_alone():
    code = """
import torch
from pipeline.diffusion.noise_schedule import make_schedule
from pipeline.diffusion.process import q_sample
from pipeline.diffusion.samplers import ddim
from pipeline.diffusion.unet import UNet
unet = UNet(image_size=8, in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(4,))
schedule, x_0 = make_schedule("linear", T=100), torch.rand(2, 1, 8, 8)
t, eps = torch.tensor([3, 90]), torch.randn(2, 1, 8, 8)
(unet(q_sample(schedule, x_0, t, eps), t) - eps).square().mean().backward()
images = ddim(unet.eval(), schedule, eps, timesteps=[99, 50, 0], noise_at=lambda i: eps)
print(tuple(images.shape))
"""
    done = python(f"{blocked(HEAVY | {'tyro', 'PIL', 'safetensors', 'psutil'})}\n{code}", ROOT)
    assert done.stdout.strip() == "(2, 1, 8, 8)", done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_installs_into_a_fresh_environment(tmp_path):
    """Shown: what is in the wheel, and that a new virtual environment imports it from there.

    Not shown: that its dependencies resolve. They are those of the environment that runs the tests, by a .pth.
    """
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    ours = sorted(path.relative_to(ROOT) for path in ROOT.glob("pipeline/**/*") if path.is_file())
    ours = [path for path in ours if "__pycache__" not in path.parts]
    for path in ours:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.name == f"{project['name'].replace('-', '_')}-{project['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {path.as_posix() for path in ours}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "fresh", with_pip=False)
    fresh = tmp_path / "fresh/bin/python"
    install = [*pip, "--python", str(fresh), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True, cwd=tmp_path)
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = f"{blocked(HEAVY)}\nimport {', '.join(MODULES)}\nprint(pipeline.__file__)"
    done = subprocess.run([fresh, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(site / "pipeline/__init__.py"), done.stderr
    code = "from importlib.metadata import metadata; print(metadata('ddpm-ray').get_all('Provides-Extra'))"
    assert "'diffusers'" in subprocess.check_output([fresh, "-I", "-c", code], cwd=tmp_path, text=True)


def test_every_library_that_is_imported_is_a_dependency():
    """What the package imports, at whatever depth of a function, it asks for; the exceptions come with others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {word.split(">")[0].split("[")[0].replace("-", "_").lower() for word in project["dependencies"]}
    provides = {"PIL": "pillow", "sklearn": "scikit_learn"}
    comes_with = {"botocore": "boto3", "mypy_boto3_s3": "boto3", "urllib3": "boto3"}
    comes_with |= {"sqlalchemy": "mlflow", "requests": "mlflow"}
    used = set()
    for path in ROOT.glob("pipeline/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
    third = used - sys.stdlib_module_names - {"pipeline"}
    missing = {name for name in third if (comes_with.get(name) or provides.get(name, name)).lower() not in asked}
    assert missing == set()
