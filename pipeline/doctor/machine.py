"""The machine that the doctor runs on: memory between processes, disks, packages, torch and its devices."""

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.doctor.finding import Finding, fail, ok, warn

__all__ = ["disks", "packages", "shared_memory", "torch_devices", "versions"]

GIB = 2**30
_LEAST_SHARED_BYTES = GIB
_LEAST_FREE_BYTES = 5 * GIB
_RAY_STOPS_AT = 0.95
"""Ray places nothing more on a node whose disk is fuller than this part."""
_DISTRIBUTION = "ddpm-ray"


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Ray keeps objects in /dev/shm; a container has 64 MB of it unless told otherwise."""
    if not folder.is_dir():
        return [ok("memory", "no /dev/shm on this system; Ray uses files")]
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free / GIB:.1f} GiB free"
    if free < _LEAST_SHARED_BYTES:
        return [warn("memory", text, "docker run --shm-size=8g, or a memory volume at /dev/shm: Ray is slow without")]
    return [ok("memory", text)]


def disks() -> list[Finding]:
    """Room where jobs write on this machine: Ray's temporary folder and a local ``$DDPM_HOME``."""
    places = [os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()]
    places += [] if storage.is_remote(storage.home()) else [storage.home()]
    return [disk(Path(place)) for place in dict.fromkeys(places)]


def disk(place: Path) -> Finding:
    """Room on the disk of a folder, which need not exist yet."""
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    full = 1 - usage.free / usage.total
    text = f"{place}: {usage.free / GIB:.0f} GiB free, {full:.0%} full"
    if full > _RAY_STOPS_AT:
        return fail("disk", text, f"make room: Ray refuses work above {_RAY_STOPS_AT:.0%}")
    if usage.free < _LEAST_FREE_BYTES:
        return warn("disk", text, "make room: checkpoints and logs need some GiB")
    return ok("disk", text)


def packages(folders: Sequence[Path] | None = None) -> list[Finding]:
    """The installed versions of what the project names itself, beside those of the first ``constraints.txt``.

    Args:
        folders: Where to look; left out, beside the code, beside the folder of the job that runs, and in the working
            directory, since an image installs the code alone.
    """
    if folders is None:
        folders = (Path(__file__).parents[2], *Path(sys.argv[0]).resolve().parents[1:2], Path())
    constraints = next(
        (folder / "constraints.txt" for folder in folders if (folder / "constraints.txt").exists()), None
    )
    if constraints is None:
        text = f"Python {sys.version.split()[0]}; no constraints.txt to compare with, here or beside the code"
        return [warn("versions", text, "run it in the project's folder: ray job submit --working-dir .")]
    pinned = dict(
        line.split("==", 1) for line in constraints.read_text().splitlines() if re.match(r"[A-Za-z0-9_.-]+==", line)
    )
    pinned = {_canonical(name): version.partition(";")[0].strip() for name, version in pinned.items()}
    found = {name: _installed(name) for name in _direct() if name in pinned}
    missing = [name for name, version in found.items() if version is None]
    other = [
        f"{name} {version} ({pinned[name]})"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != pinned[name].partition("+")[0]
    ]
    findings = []
    if missing:
        findings.append(fail("versions", f"not installed: {', '.join(missing)}", "make install"))
    if other:
        findings.append(warn("versions", f"not as pinned: {', '.join(other)}", "make install, on every node alike"))
    return findings or [ok("versions", f"Python {sys.version.split()[0]}, {len(found)} packages as pinned")]


def torch_devices() -> list[Finding]:
    """Each GPU multiplies as the CPU does, and they add up together; without one, gloo does."""
    import torch

    if not torch.cuda.is_available():
        if list(Path("/dev").glob("nvidia[0-9]*")):
            mend = "install a torch for this driver's CUDA (nvidia-smi shows it)"
            return [fail("torch", f"torch {torch.__version__} does not see this machine's GPUs", mend)]
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            return [fail("torch", "this torch has no gloo: workers cannot add gradients", "install another build")]
        return [ok("torch", f"torch {torch.__version__}, no GPU: jobs run on {torch.get_num_threads()} CPU threads")]
    return [_gpus()]


def _gpus() -> Finding:
    import torch

    count = torch.cuda.device_count()
    a = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) / 4096
    for index in range(count):
        if not torch.allclose((a.to(f"cuda:{index}") @ a.to(f"cuda:{index}")).cpu(), a @ a, rtol=1e-2):
            return fail("torch", f"GPU {index} multiplies wrongly", "take the machine out of the cluster")
    if not torch.distributed.is_nccl_available():
        return fail("torch", "this torch has no NCCL: GPUs cannot add gradients", "install a CUDA build of torch")
    ones = [torch.ones(8, device=f"cuda:{index}") for index in range(count)]
    if count > 1:
        torch.cuda.nccl.all_reduce(ones)  # type: ignore[no-untyped-call]
    if any(not torch.equal(part.cpu(), torch.full((8,), float(count))) for part in ones):
        return fail("torch", "NCCL adds wrongly over the GPUs", "NCCL_DEBUG=INFO shows which link it uses")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return ok("torch", f"torch {torch.__version__}, NCCL {nccl}, {count} GPUs: {torch.cuda.get_device_name(0)}")


def versions() -> dict[str, str]:
    """The installed version of Python and of what the project names itself."""
    found = {name: _installed(name) for name in _direct()}
    return {"python": sys.version.split()[0], **{name: version for name, version in found.items() if version}}


def _direct() -> list[str]:
    try:
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the code; the main ones then
        required = ["ray", "torch", "mlflow", "numpy", "boto3", "pyarrow", "webdataset", "safetensors"]
    names = [
        match[0] for entry in required if "extra ==" not in entry and (match := re.match(r"[A-Za-z0-9_.-]+", entry))
    ]
    return [_canonical(name) for name in names]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
