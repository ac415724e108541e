"""Every command of a job in the documentation, run in the order of its page: as written, but small, on one cluster."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from clusters import Cluster, cluster
from documented import ALL_COMMANDS, ROOT, Command
from layouts import celeba_hq, cifar10, hugging_face, imagenet64, imagenet64_with_labels, lsun
from PIL import Image
from ported import ported
from runner import load_job

from pipeline.config import ModelConfig
from pipeline.model_folder import build_unet

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALLER = {
    "train": "--steps 6 --checkpoint-every 3 --base-channels 8 --batch-size 16 --quality-images 0 --grid-images 4 "
    "--sampling-steps 3 --num-images 4 --chunk-size 4 --num-workers 1",
    "tune": "--steps 4 --checkpoint-every 4 --batch-size 16 --base-channels 8 --schedules linear --Ts 100 "
    "--num-images 4 --chunk-size 4 --sampling-steps 3 --quality-images 0 --num-workers 1 --grid-images 4",
    "evaluate": "--num-images 4 --chunk-size 4 --sampling-steps 3 --num-workers 1",
    "show": "--num-images 2 --sampling-steps 3",
}
"""What makes a command short: appended, so that it overrides what is written."""
WITHOUT = ("--use-gpu", "--compile", "--features inception", "--inception-weights INCEPTION", "--num-workers 4")
"""What needs GPUs, a compiler, or the weights of 2015."""
DIGITS = ("prepare_data --source digits", "train --preset digits --name first")
CIFAR = "prepare_data --source cifar10:cifar-10-binary.tar.gz --data cifar10"
MINE = "prepare_data --source folder:PICTURES --data mine --image-size 16"
BEFORE: dict[str, tuple[str, ...]] = {
    "README.md": (*DIGITS, CIFAR),
    "docs/evaluation.md": (*DIGITS, "train --preset digits --name second --seed 1", "evaluate --run second --last"),
    "docs/howto.md": (*DIGITS, "evaluate --run first", CIFAR, MINE),
}
"""What a page takes for granted, beside what the pages before it have left."""
FILLED = {
    r"^folder:(PICTURES|PATH)$": "folder:pictures",
    r"^cifar10(-test)?:(PATH|CIFAR)$": r"cifar10\1:cifar-10-binary.tar.gz",
    r"^webdataset:s3://BUCKET/.*": "webdataset:shards-{00000..00001}.tar",
    r"^/scratch/.*": "DESK/scratch",
    r"^50000$": "6",
    r"^first:250$": "first:3",
    r"^first:1500$": "first:6",
}
"""What stands for something of the reader's, or for a step that a small run does not reach."""


def write_pictures() -> None:
    Path("pictures").mkdir()
    generator = np.random.default_rng(0)
    for number in range(80):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number:03d}.jpg")


def write_shards() -> None:
    """Two shards of another program."""
    for number in range(2):
        with webdataset.TarWriter(f"shards-{number:05d}.tar") as shard:
            for path in sorted(Path("pictures").iterdir())[number::2]:
                shard.write({"__key__": path.stem, "jpg": path.read_bytes()})


def write_models() -> None:
    """Networks of others, half as wide as theirs."""
    model = ModelConfig(
        image_size=32,
        image_channels=3,
        base_channels=64,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
    )
    torch.save(ported(build_unet(model).state_dict(), levels=4), "model-790000.ckpt")
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained("ddpm-cifar10-32")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Cluster]]:
    """A working directory with all files that the pages speak of, and a cluster."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        makers = (cifar10, celeba_hq, lsun, imagenet64, imagenet64_with_labels, hugging_face)
        for make in (*makers, write_pictures, write_shards, write_models):
            make()
    with cluster(head_cpus=2, preemption=False) as nodes:
        yield folder, nodes


@pytest.fixture(scope="module")
def reader() -> "Reader":
    """Who reads all pages."""
    return Reader()


class Reader:
    """Does what pages say, word by word, but nothing a second time; remembers what the last sweep was called."""

    def __init__(self) -> None:
        self.sweep = ""
        self.done: set[str] = set()

    def follow(self, job: str, words: list[str]) -> None:
        """Runs one command, small."""
        flags = self.small(job, self.filled(words))
        meant = f"{job} {load_job(job).parse_arguments(flags)}"
        if (meant := re.sub(r"\b(name|json)=[^,)]*", "", meant)) in self.done:
            return
        self.done.add(meant)
        if job == "prepare_data" and "--source" in flags:
            name = flags[flags.index("--data") + 1] if "--data" in flags else "digits"
            shutil.rmtree(Path(os.environ["DDPM_HOME"]) / "data" / name, ignore_errors=True)  # another story begins
        result, _ = load_job(job).main(flags)
        if job == "tune":
            self.sweep = result["sweep"]

    def filled(self, words: list[str]) -> list[str]:
        """The words with the reader's own things in the place of capitals."""
        line = f" {shlex.join(words)} "
        for flag in WITHOUT:
            line = line.replace(f" {flag} ", " ")
        found = shlex.split(line)
        names = {"--run": "first", "--data": "named", "--restore": self.sweep, "--checkpoint": self.checkpoint()}
        for place, (before, word) in enumerate(zip(["", *found], found, strict=False)):
            if word in ("NAME", "FOLDER"):
                found[place] = names[before]
            for pattern, filling in FILLED.items():
                found[place] = re.sub(pattern, filling, found[place]).replace("DESK", str(Path.cwd()))
        return found

    def small(self, job: str, flags: list[str]) -> list[str]:
        """The flags with those that make it short."""
        if {"--report", "--dry-run", "--restore", "--compare"} & set(flags):
            return flags
        more = SMALLER.get(job, "").split()
        if "--init-from" in flags:
            more += ["--base-channels", "64"]
        if "--early-stopping" in flags:
            more += ["--checkpoint-every", "2"]
        if "--num-trials" in flags:
            more += ["--num-trials", "2", "--seeds", "1"]
        return [*flags, *more]

    @staticmethod
    def checkpoint() -> str:
        return str(Path(os.environ["DDPM_HOME"]) / "runs" / "first" / "step-00000006")


def page_of(command: Command) -> str:
    return str(command.page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page, _ in groupby(ALL_COMMANDS, page_of)])
def test_the_commands_of_a_page_do_what_they_say(
    page: str, desk: tuple[Path, Cluster], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, nodes = desk
    home = folder / "home"
    monkeypatch.chdir(folder)
    for name, value in {**nodes.environment, "DDPM_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    for line in BEFORE.get(page, ()):
        job, *words = shlex.split(line)
        reader.follow(job, words)
    for command in (command for command in ALL_COMMANDS if page_of(command) == page):
        print(f"{time.monotonic():.0f} {command} {shlex.join(command.words)}", flush=True)
        reader.follow(command.job, command.flags)
    if page == "docs/tutorial.md":
        report = (home / "reports" / "mine.html").read_text()
        assert report.count("<circle") == 2  # a point for each checkpoint
        assert (home / "show" / "mine-step-6" / "index.html").exists()
