"""A model as files: what is written is read back, and nothing damaged or foreign gets in."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from pipeline.errors import UserError, WorldError
from pipeline.model_folder import (
    EMA_FILE,
    META_FILE,
    Meta,
    build_schedule,
    build_unet,
    load_tensors,
    read_meta,
    verified_bytes,
    write_meta,
    write_tensors,
)

TINY = ModelConfig(image_size=8, base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
CONFIG = TrainConfig(
    name="tiny",
    model=TINY,
    diffusion=ScheduleConfig(schedule="cosine", T=17),
    data=DataConfig(batch_size=32, num_streams=8),
)
DATA = {"location": "/data/digits", "digest": "abc", "num_images": 1797, "classes": ["0", "1"]}
CODE = {"version": "0.1.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with the weights of a tiny network."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tensors(folder, EMA_FILE, build_unet(TINY).state_dict())
    write_meta(folder, step=250, config=CONFIG, data=DATA, code=CODE)
    return folder


def edit_meta(folder: Path, **changes: object) -> None:
    record = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps(record | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(WorldError) as error:
        load_tensors(folder, EMA_FILE, read_meta(folder))
    text = str(error.value)
    assert "\n" not in text
    return text


def test_weights_are_read_back_bit_for_bit(folder):
    written, read = build_unet(TINY).state_dict(), load_tensors(folder, EMA_FILE, read_meta(folder))
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) and read[key].dtype == written[key].dtype for key in written)


def test_read_weights_fit_a_network_built_from_the_meta_alone(folder):
    meta = read_meta(folder)
    unet = build_unet(meta.config.model, seed=1)
    unet.load_state_dict(load_tensors(folder, EMA_FILE, meta), strict=True)
    x, t = torch.ones(1, 1, 8, 8), torch.tensor([3])
    assert torch.equal(unet.eval()(x, t), build_unet(TINY).eval()(x, t))


def test_the_meta_is_read_back(folder):
    digest = read_meta(folder).files[EMA_FILE]
    assert len(digest) == 64
    assert read_meta(folder) == Meta(step=250, config=CONFIG, data=DATA, code=CODE, files={EMA_FILE: digest})


def test_write_meta_returns_what_read_meta_reads(tmp_path):
    write_tensors(tmp_path, EMA_FILE, {"x": torch.zeros(1)})
    assert write_meta(tmp_path, step=1, config=CONFIG, data=DATA, code=CODE) == read_meta(tmp_path)


def test_the_meta_covers_every_file_of_the_folder_but_itself(folder):
    write_tensors(folder, "model.safetensors", {"x": torch.zeros(1)})
    meta = write_meta(folder, step=2, config=CONFIG, data=DATA, code=CODE)
    assert set(meta.files) == {EMA_FILE, "model.safetensors"}


def test_the_meta_is_json_that_a_person_can_read(folder):
    text = (folder / META_FILE).read_text()
    assert '\n  "step": 250,\n' in text
    assert json.loads(text)["config"]["schedule"] == "cosine"


def test_tensors_that_are_views_are_written(tmp_path):
    view = torch.arange(6.0).reshape(2, 3).t()
    write_tensors(tmp_path, "x.safetensors", {"view": view})
    meta = write_meta(tmp_path, step=0, config=CONFIG, data=DATA, code=CODE)
    assert torch.equal(load_tensors(tmp_path, "x.safetensors", meta)["view"], view)


def test_a_truncated_file_is_refused_by_name(folder):
    data = (folder / EMA_FILE).read_bytes()
    (folder / EMA_FILE).write_bytes(data[:-1])
    assert refusal(folder).startswith(f"{folder / EMA_FILE} is damaged: {len(data) - 1} bytes, sha256 ")


def test_a_single_flipped_bit_is_refused_by_name(folder):
    data = bytearray((folder / EMA_FILE).read_bytes())
    data[-1] ^= 1
    (folder / EMA_FILE).write_bytes(bytes(data))
    assert refusal(folder).startswith(f"{folder / EMA_FILE} is damaged")


def test_a_missing_file_is_refused_by_name(folder):
    (folder / EMA_FILE).unlink()
    assert refusal(folder) == f"{folder / EMA_FILE} cannot be read: No such file or directory"


def test_a_file_that_the_meta_does_not_list_is_never_read(folder):
    write_tensors(folder, "stray.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(WorldError, match=rf"has no stray.safetensors \(it holds {EMA_FILE}\)"):
        verified_bytes(folder, "stray.safetensors", read_meta(folder))


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("dump", [pickle.dumps, "torch"], ids=["pickle", "torch.save"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_never_run(folder, tmp_path, dump):
    bomb = Bomb(tmp_path / "exploded")
    if dump == "torch":
        torch.save(bomb, folder / EMA_FILE)
    else:
        (folder / EMA_FILE).write_bytes(dump(bomb))
    write_meta(folder, step=250, config=CONFIG, data=DATA, code=CODE)
    assert refusal(folder).startswith(f"{folder / EMA_FILE} is no safetensors file: ")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_meta_is_refused_by_name(folder):
    (folder / META_FILE).unlink()
    assert refusal(folder).startswith(f"{folder}/{META_FILE} is missing or damaged: FileNotFoundError")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '"text"', "{}", b"\xff\xfe".decode("latin-1")],
    ids=["empty", "cut off", "null", "list", "string", "no keys", "not json"],
)
def test_a_damaged_meta_is_refused_by_name(folder, text):
    (folder / META_FILE).write_text(text)
    assert refusal(folder).startswith(f"{folder}/{META_FILE} is missing or damaged: ")


def test_a_meta_that_is_not_text_is_refused_by_name(folder):
    (folder / META_FILE).write_bytes(b"\xff\xfe\x00")
    assert refusal(folder).startswith(f"{folder}/{META_FILE} is missing or damaged: ")


@pytest.mark.parametrize(
    "changes", [{"config": None}, {"config": []}, {"step": "many"}, {"files": None}, {"files": ["x"]}]
)
def test_a_meta_with_a_value_of_another_kind_is_refused_by_name(folder, changes):
    edit_meta(folder, **changes)
    assert refusal(folder).startswith(f"{folder}/{META_FILE} is missing or damaged: ")


def test_another_format_version_is_refused_with_both_numbers(folder):
    edit_meta(folder, format_version=2)
    assert refusal(folder) == f"{folder}: checkpoint format 2; this version reads 1"


def test_a_knob_of_other_code_is_refused_by_name(folder):
    config = json.loads((folder / META_FILE).read_text())["config"]
    edit_meta(folder, config=config | {"flux_capacitor": 1})
    assert refusal(folder).startswith(f"{folder}/{META_FILE} was written by other code: unknown knob 'flux_capacitor'")


def test_a_knob_that_this_code_would_refuse_is_refused(folder):
    config = json.loads((folder / META_FILE).read_text())["config"]
    edit_meta(folder, config=config | {"dropout": 2.0})
    assert refusal(folder).startswith(f"{folder}/{META_FILE} was written by other code: --dropout 2.0")


def test_a_knob_that_the_meta_lacks_takes_its_default(folder):
    config = json.loads((folder / META_FILE).read_text())["config"]
    del config["ema_warmup"]
    edit_meta(folder, config=config)
    assert read_meta(folder).config == CONFIG


def test_a_checkpoint_from_before_predictions_and_classes_is_an_unconditional_model_of_eps(folder):
    config = json.loads((folder / META_FILE).read_text())["config"]
    newer = ("prediction", "num_classes", "loss_weighting", "min_snr_gamma", "label_dropout", "guidance")
    edit_meta(folder, config={name: value for name, value in config.items() if name not in newer})
    meta = read_meta(folder)
    assert (meta.config.model.prediction, meta.config.model.num_classes) == ("eps", 0)
    build_unet(meta.config.model, seed=1).load_state_dict(load_tensors(folder, EMA_FILE, meta), strict=True)


def test_a_class_conditional_model_of_v_comes_back_from_its_folder(tmp_path):
    told = replace(CONFIG, model=replace(TINY, prediction="v", num_classes=3))
    write_tensors(tmp_path, EMA_FILE, build_unet(told.model, seed=4).state_dict())
    write_meta(tmp_path, step=1, config=told, data=DATA, code=CODE)
    meta = read_meta(tmp_path)
    assert meta.config == told
    unet = build_unet(meta.config.model)
    unet.load_state_dict(load_tensors(tmp_path, EMA_FILE, meta), strict=True)
    assert torch.equal(unet.time_embedding.classes.weight, build_unet(told.model, seed=4).time_embedding.classes.weight)


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = build_unet(TINY, seed=5).state_dict()
    torch.manual_seed(2)
    second = build_unet(TINY, seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_other_weights():
    first, second = build_unet(TINY, seed=5).state_dict(), build_unet(TINY, seed=6).state_dict()
    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])


def test_building_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_unet(TINY, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_schedule_is_built_from_every_knob_of_its_group():
    schedule = build_schedule(ScheduleConfig(schedule="linear", T=500, beta_start=2e-4, beta_end=0.03))
    assert schedule.T == 500
    assert schedule.betas[0].item() == pytest.approx(4e-4)
    assert schedule.betas[-1].item() == pytest.approx(0.06)


def test_a_schedule_that_leaves_signal_is_refused_unless_allowed():
    weak = ScheduleConfig(beta_end=0.001)
    with pytest.raises(UserError, match="signal"):
        build_schedule(weak)
    assert build_schedule(ScheduleConfig(beta_end=0.001, allow_signal_at_T=True)).signal_at_T > 0.1
