"""Named sets of defaults."""

import typing

import pytest
import torch

from pipeline.config import TrainConfig, to_flat
from pipeline.errors import UserError
from pipeline.model_folder import build_schedule, build_unet
from pipeline.presets import PRESETS, preset

PAPER = {
    "image_channels": 3,
    "base_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": [16],
    "schedule": "linear",
    "T": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "adam_eps": 1e-8,
    "lr_warmup_steps": 5000,
    "lr_decay": "constant",
    "grad_clip": 1.0,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "random_flip": True,
}
CIFAR10 = PAPER | {
    "image_size": 32,
    "channel_mult": [1, 2, 2, 2],
    "dropout": 0.1,
    "batch_size": 128,
    "lr": 2e-4,
    "steps": 800_000,
    "variance": "fixed-large",
}
AT_256 = PAPER | {
    "image_size": 256,
    "channel_mult": [1, 1, 2, 2, 4, 4],
    "dropout": 0.0,
    "batch_size": 64,
    "lr": 2e-5,
    "variance": "fixed-small",
}


def test_the_presets_are_those_that_the_command_line_offers():
    assert set(PRESETS) == set(typing.get_args(typing.get_type_hints(TrainConfig)["preset"]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_knows_its_name(name):
    assert preset(name).preset == name


def test_the_default_config_is_the_digits_preset():
    assert preset("digits") == TrainConfig()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cifar10", CIFAR10),
        ("lsun256", AT_256 | {"steps": 1_200_000}),
        ("celebahq256", AT_256 | {"steps": 500_000}),
    ],
)
def test_a_paper_preset_is_the_recipe_of_the_paper_s_code(name, recipe):
    flat = to_flat(preset(name))
    assert {knob: flat[knob] for knob in recipe} == recipe


@pytest.mark.parametrize(
    ("name", "parameters"), [("cifar10", 35_746_307), ("lsun256", 113_673_219), ("celebahq256", 113_673_219)]
)
def test_a_paper_preset_has_the_paper_s_number_of_parameters(name, parameters):
    with torch.device("meta"):
        unet = build_unet(preset(name).model)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_the_schedule_of_a_preset_leaves_no_signal(name):
    assert build_schedule(preset(name).diffusion).signal_at_T < 0.01


def test_a_wrong_knob_in_a_preset_would_be_refused(monkeypatch):
    monkeypatch.setitem(PRESETS, "digits", {"batchsize": 3})
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        preset("digits")
