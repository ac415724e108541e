"""The commands of docs/datasets.md, on small files of the layouts in which the data sets are published."""

import re
import shlex
from pathlib import Path

import pytest
from layouts import LAYOUTS

from pipeline import cli
from pipeline.config import PrepareConfig
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.data.verify import verify

DOCS = (Path(__file__).resolve().parents[2] / "docs/datasets.md").read_text()
COMMANDS = re.findall(r"^python jobs/prepare_data\.py (.+)$", DOCS, flags=re.MULTILINE)


def config_of(command: str) -> PrepareConfig:
    return cli.parse(PrepareConfig, shlex.split(command), program="jobs/prepare_data.py")


def test_every_published_data_set_has_its_command():
    assert [config_of(command).data for command in COMMANDS] == list(LAYOUTS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(config_of(command).data))
def test_a_documented_command_prepares_files_of_that_layout(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    config = config_of(command)
    make, num_images, size, num_classes = LAYOUTS[str(config.data)]
    make()
    source = open_source(config.source, image_size=config.image_size, crop=config.crop)
    manifest = prepare(source, config, str(tmp_path / "out")).manifest
    assert (manifest.num_images, manifest.image_size, manifest.image_channels) == (num_images, size, 3)
    assert len(manifest.class_names) == num_classes
    assert verify(str(tmp_path / "out")).faults == ()
