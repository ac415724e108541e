"""The convert job, from a folder of the real diffusers to a distance, and back."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from runner import load_job, run_job, succeed

from pipeline.errors import UserError

diffusers = pytest.importorskip("diffusers")


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        load_job("convert").main(list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("one_cluster")
@pytest.mark.slow
def test_a_folder_of_diffusers_gets_its_distance_by_two_commands_and_goes_back(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    succeed("prepare_data", "--source", "digits")
    made = succeed(
        "convert", "--source", f"diffusers:{tmp_path}/theirs", "--destination", "models/theirs", "--step", "9"
    )
    assert (made["image_size"], made["T"], made["step"]) == (8, 1000, 9)

    words = ["--checkpoint", "models/theirs", "--reference", "digits", "--num-images", "20", "--chunk-size", "10"]
    found = succeed("evaluate", *words, "--sampling-steps", "3", "--num-workers", "1")
    (result,) = found["evaluated"]
    assert result["step"] == 9
    assert 0 < result["value"] < float("inf")

    done = run_job("convert", "--source", "model:models/theirs", "--destination", str(tmp_path / "again"))
    assert done.code == 0, done.stderr
    assert "num_inference_steps=1000" in done.stdout
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "again")
    assert all(torch.equal(again.unet.state_dict()[name], tensor) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("source", ["google/ddpm-cifar10-32", "keras:x", "diffusers:"])
def test_an_unknown_kind_of_source_is_refused_with_the_known_ones(source):
    message = refusal("--source", source, "--destination", "x")
    assert f"--source {source}: must be diffusers:FOLDER, state-dict:FILE or model:FOLDER" in message


def test_flags_of_an_import_are_refused_for_an_export():
    words = ["--source", "model:x", "--destination", "y", "--step", "3"]
    assert "--image-size, --step and what the paper would fill in belong to an import" in refusal(*words)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 0}))
    done = run_job("convert", "--source", f"diffusers:{tmp_path}", "--destination", str(tmp_path / "x"))
    assert done.code == 2
    assert done.stderr == (f"error: {tmp_path}/config.json: sample_size is 0; allowed are whole numbers in 1..65536\n")
