"""Files of others, damaged at random: whatever their bytes say, reading ends in a model or in one line."""

import io
import json
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ported import ported
from torch import Tensor

from pipeline.config import ModelConfig, ScheduleConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.interop.diffusers_folder import read_folder, write_folder
from pipeline.interop.diffusers_scheduler import our_schedule, their_scheduler
from pipeline.interop.diffusers_unet import our_model, their_unet
from pipeline.interop.foreign_files import read_tensors
from pipeline.interop.state_dicts import read_state_dict
from pipeline.model_folder import build_unet

MODEL = ModelConfig(
    image_size=8, image_channels=1, base_channels=64, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,)
)
TENSORS = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(4, dtype=torch.float16))
SILLY = (None, True, -1, 0, 3.5, 1e400, 10**30, float("nan"), "", "wide", [], [0, 0], [None], {}, {"x": 1}, [[1]])


def outcome(read: Callable[[], Any]) -> str | None:
    """None for success, else the one line of the refusal; whatever else is raised is a bug and goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about old pickles
        try:
            read()
        except UserError as error:
            message = str(error)
        else:
            return None
    assert "\n" not in message
    return message


def saved(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def safe() -> bytes:
    return safetensors.torch.save(dict(TENSORS))


def mutated(data: bytes, dice: random.Random) -> bytes:
    kind, place = dice.randrange(5), dice.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + dice.randbytes(dice.randrange(1, 9)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + dice.randrange(1, 9) :]
    changed = bytearray(data)
    for _ in range(1 if kind == 3 else 12):
        changed[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize(
    "whole",
    [saved(True), saved(False), safe(), pickle.dumps({"a": [1, 2], "b": (3.0, None)}, protocol=2)],
    ids=["zip", "old torch", "safetensors", "pickle"],
)
def test_two_hundred_mutations_of_a_file_are_read_or_refused_in_one_line(tmp_path, whole):
    dice, path, refused = random.Random(7), tmp_path / "x.ckpt", 0
    for _ in range(200):
        path.write_bytes(mutated(whole, dice))
        message = outcome(lambda: read_tensors(str(path)))
        assert message is None or str(path) in message
        refused += message is not None
    assert refused > 50


@pytest.mark.parametrize(
    "program",
    [b"\x80\x02.", b"\x80\x02}b.", b"\x80\x02(u.", b"\x80\x02h\x05.", b"\x80\x02]a.", b"\x80\x02J\x01", b"\x80"],
    ids=["stop", "build", "setitems", "get", "append", "short", "nothing"],
)
def test_pickles_that_do_nothing_sensible_are_refused(tmp_path, program):
    (tmp_path / "x.ckpt").write_bytes(program)
    assert "holds tensors alone" in str(outcome(lambda: read_tensors(str(tmp_path / "x.ckpt"))))


@pytest.mark.parametrize(
    "content",
    [
        {"x": torch.ones(1).expand(10**12)},
        {"x": torch.eye(3).to_sparse()},
        {"x": torch.empty(3, device="meta")},
        {3: torch.ones(1)},
        {"line\nbreak": torch.ones(1)},
        torch.ones(3),
        None,
    ],
    ids=["a thousand billion", "sparse", "meta", "number", "line", "tensor", "nothing"],
)
def test_tensors_without_values_and_names_that_are_none_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    assert str(tmp_path / "x.ckpt") in str(outcome(lambda: read_tensors(str(tmp_path / "x.ckpt"))))


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return ported(build_unet(MODEL, seed=2).state_dict(), levels=2)


def broken(theirs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """State dicts with a part left out, a weight without values or axes, or a number that no network has."""
    for part in ("down.", "down.0.", "down.1.", "down.0.block", "up.", "mid.", "conv_in", "conv_out", "temb.dense.1"):
        yield {name: tensor for name, tensor in theirs.items() if not name.startswith(part)}
    for name in ("conv_in.weight", "conv_out.weight", "down.0.block.0.conv1.weight", "temb.dense.0.weight"):
        for shape in ((0,), (), (64, 0, 3, 3), (0, 1, 3, 3), (3, 64), (64, 5, 3, 3)):
            yield theirs | {name: torch.zeros(shape)}
    for name in ("down.9999999999.block.0.x", "down.0.block.9999999999.x", "down.99999999999999.attn.0.x"):
        yield theirs | {name: torch.zeros(1)}
    yield {name.replace("down.0", "down.-1"): tensor for name, tensor in theirs.items()}


def test_state_dicts_with_parts_missing_or_empty_are_refused_with_the_file(tmp_path, theirs):
    location = str(tmp_path / "x.safetensors")
    for state in broken(theirs):
        safetensors.torch.save_file(state, location)
        assert location in str(outcome(lambda: read_state_dict(location, image_size=8)))


@pytest.mark.parametrize("missing", ["out.2.weight", "input_blocks.1.0.out_layers.0.weight"])
def test_what_looks_like_openais_and_is_not_whole_is_still_called_so(tmp_path, missing):
    state = {
        "time_embed.0.weight": torch.zeros(8, 2),
        "input_blocks.0.0.weight": torch.zeros(2, 3, 3, 3),
        "input_blocks.1.0.out_layers.0.weight": torch.zeros(2),
        "input_blocks.1.0.emb_layers.1.weight": torch.zeros(4, 8),
        "out.2.weight": torch.zeros(3, 2, 3, 3),
    }
    del state[missing]
    torch.save(state, tmp_path / "x.pt")
    message = outcome(lambda: read_state_dict(str(tmp_path / "x.pt"), image_size=8))
    assert "improved-diffusion or guided-diffusion" in str(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(str(tmp_path), TrainConfig(model=MODEL), build_unet(MODEL, seed=2).state_dict())
    return tmp_path


CONFIGS = {
    "unet/config.json": their_unet(MODEL),
    "scheduler/scheduler_config.json": their_scheduler(TrainConfig(diffusion=ScheduleConfig(T=50))),
}


@pytest.mark.parametrize(("part", "read"), list(zip(CONFIGS, (our_model, our_schedule), strict=True)))
def test_a_silly_value_of_any_field_of_a_config_is_read_or_refused_in_one_line(part, read):
    for field in CONFIGS[part]:
        for value in SILLY:
            config = json.loads(json.dumps(CONFIGS[part] | {field: value}))
            message = outcome(lambda config=config: read(config, where="config.json"))
            assert message is None or message.startswith("config.json"), (field, value)
            is_flagged = "--" in str(message) and "names no sample_size; give --image-size" not in str(message)
            assert not is_flagged, f"{field} {value}: a flag that nobody gave: {message}"


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        (1, "dynamic_thresholding_ratio", None, "dynamic_thresholding_ratio is None"),
        (0, "block_out_channels", [0, 0], "block_out_channels is [0, 0]; allowed are whole numbers in 1..65536"),
        (0, "sample_size", 0, "sample_size is 0; allowed are whole numbers"),
        (1, "num_train_timesteps", 10**12, "num_train_timesteps is 1000000000000; allowed are whole numbers"),
    ],
    ids=["ratio", "widths", "size", "steps"],
)
def test_such_a_value_is_named_by_its_field(folder, part, field, value, words):
    name = list(CONFIGS)[part]
    (folder / name).write_text(json.dumps(CONFIGS[name] | {field: value} | ({"thresholding": True} if part else {})))
    assert words in str(outcome(lambda: read_folder(str(folder))))


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a": \ud800}', "null", "[1]", '{"a": 1'], ids=len)
def test_json_that_is_none_is_refused(folder, text):
    file = folder / "unet/config.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    assert str(file) in str(outcome(lambda: read_folder(str(folder))))
