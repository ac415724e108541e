"""State dicts without a config: the DDPM paper's network is read, others are refused with what was found."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ported import ported
from torch import Tensor

from pipeline.config import ModelConfig, RecipeConfig, ScheduleConfig
from pipeline.errors import UserError
from pipeline.interop.state_dicts import read_state_dict
from pipeline.model_folder import build_unet, write_tensors

MODEL = ModelConfig(
    image_size=16,
    image_channels=3,
    base_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
)


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return build_unet(MODEL, seed=2).state_dict()


@pytest.fixture
def theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return ported(ours, levels=3)


def save(state: Any, folder: Path) -> str:
    torch.save(state, folder / "model.ckpt")
    return str(folder / "model.ckpt")


def refusal(location: str, image_size: int | None = 16) -> str:
    with pytest.raises(UserError) as error:
        read_state_dict(location, image_size=image_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["torch", "torch of before 1.6", "safetensors", "data parallel"])
def test_the_papers_network_is_read_bit_for_bit(tmp_path, ours, theirs, form):
    location = str(tmp_path / "model.ckpt")
    if form == "safetensors":
        write_tensors(tmp_path, "model.ckpt", theirs)
    elif form == "data parallel":
        torch.save({f"module.{name}": tensor for name, tensor in theirs.items()}, location)
    else:
        torch.save(theirs, location, _use_new_zipfile_serialization=form == "torch")
    made = read_state_dict(location, image_size=16)
    config, tensors = made.config, made.tensors
    assert "--variance fixed-small" in made.notes[0]
    assert config.model == MODEL
    assert config.diffusion == ScheduleConfig(schedule="linear", T=1000, beta_start=1e-4, beta_end=0.02)
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], ours[name]) for name in ours)


def test_at_32_pixels_the_variance_is_that_of_the_papers_cifar10_recipe_unless_a_flag_says_so(tmp_path, theirs):
    location = save(theirs, tmp_path)
    assert read_state_dict(location, image_size=32).config.sampling.variance == "fixed-large"
    made = read_state_dict(location, image_size=32, given=RecipeConfig(variance="fixed-small"))
    assert made.config.sampling.variance == "fixed-small"
    assert "--variance" not in made.notes[0]


@pytest.mark.parametrize("has_ema", [True, False])
def test_of_what_a_training_of_ermongroup_saves_the_average_is_read(tmp_path, ours, theirs, has_ema):
    raw = {f"module.{name}": tensor + (1 if has_ema else 0) for name, tensor in theirs.items()}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict()
    made = read_state_dict(save([raw, optimizer, 3, 5000, *([theirs] if has_ema else [])], tmp_path), image_size=16)
    assert all(torch.equal(made.tensors[name], ours[name]) for name in ours)
    what = "its EMA, the fifth entry" if has_ema else "its last weights, the first entry: it has no EMA"
    assert made.notes[1] == f"read {what} of a checkpoint of step 5,000"


def test_the_size_of_the_images_must_be_given(tmp_path, theirs):
    assert "weights do not tell the size of the images; give --image-size" in refusal(save(theirs, tmp_path), None)


def test_a_learned_variance_is_refused(tmp_path, theirs):
    theirs["conv_out.weight"] = torch.cat([theirs["conv_out.weight"]] * 2)
    assert "conv_out gives 6 channels of 3 (a learned variance)" in refusal(save(theirs, tmp_path))


def test_a_missing_and_a_foreign_weight_are_refused_by_name(tmp_path, theirs):
    bias = theirs.pop("up.0.block.1.conv2.bias")
    assert "has no up.0.block.1.conv2.bias, which our network has as up.2.blocks.1" in refusal(save(theirs, tmp_path))
    whole = theirs | {"up.0.block.1.conv2.bias": bias, "down.0.block.0.conv_shortcut.weight": bias}
    assert "1 weights that our network lacks: down.0.block.0.conv_shortcut.weight" in refusal(save(whole, tmp_path))


def test_a_narrow_network_of_32_groups_is_refused(tmp_path):
    narrow = ModelConfig(image_size=8, image_channels=3, base_channels=32, channel_mult=(1,), attention_resolutions=())
    location = save(ported(build_unet(narrow).state_dict(), levels=1), tmp_path)
    assert "32 base channels; with 32 groups they must be 64 or more" in refusal(location, 8)


def test_a_network_of_openai_is_refused_with_what_was_found_and_what_is_allowed(tmp_path):
    state = {
        "time_embed.0.weight": torch.zeros(512, 128),
        "input_blocks.0.0.weight": torch.zeros(128, 3, 3, 3),
        "input_blocks.1.0.out_layers.0.weight": torch.zeros(128),
        "input_blocks.1.0.emb_layers.1.weight": torch.zeros(256, 512),
        "label_emb.weight": torch.zeros(10, 512),
        "out.2.weight": torch.zeros(6, 128, 3, 3),
    }
    message = refusal(save(state, tmp_path))
    assert "improved-diffusion or guided-diffusion, which is another network than ours" in message
    assert "6 output channels of 3 (a learned variance); scale-shift norms (use_scale_shift_norm); classes" in message
    assert "allowed is the DDPM paper's network as pesser/pytorch_diffusion and ermongroup/ddim save it" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"x": torch.zeros(1)}], "holds a list of 1; give a state dict"),
        ({"step": 3, "model": {"x": torch.zeros(1)}}, "holds a dict of 2; give a state dict"),
        ({"x": torch.zeros(1)}, "is no network that is known here (it has x, ...)"),
        ({}, "it has nothing"),
    ],
    ids=["list", "nested", "unknown", "empty"],
)
def test_files_of_other_things_are_refused_with_what_they_hold(tmp_path, content, words):
    assert words in refusal(save(content, tmp_path))


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_program_in_a_pickle_is_refused_and_never_run(tmp_path, zipped):
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert "holds tensors alone" in refusal(str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_missing_files_are_refused_by_name(tmp_path, theirs):
    location = save(theirs, tmp_path)
    Path(location).write_bytes(Path(location).read_bytes()[:-500])
    assert location in refusal(location)
    Path(location).write_bytes(b"GIF89a")
    assert "is neither a safetensors file nor one of torch.save" in refusal(location)
    assert "is no file; give one that is there" in refusal(str(tmp_path / "nothing"))
    assert "is no file; give one that is there" in refusal(str(tmp_path))
