"""Folders of diffusers: the real library's are read here, and the real library samples what is written here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ConvertConfig, ModelConfig, RecipeConfig, SamplingConfig, ScheduleConfig, TrainConfig
from pipeline.diffusion.denoisers import eps_denoiser
from pipeline.diffusion.samplers import ancestral
from pipeline.diffusion.timesteps import sampling_timesteps
from pipeline.errors import UserError, WorldError
from pipeline.interop.diffusers_scheduler import our_schedule, their_scheduler
from pipeline.interop.recipe import complete
from pipeline.interop.session import convert
from pipeline.model_folder import EMA_FILE, build_schedule, build_unet, fetch_model, write_meta, write_tensors

diffusers = pytest.importorskip("diffusers")

# The layout of google/ddpm-cifar10-32, a quarter as wide.
CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL = ModelConfig(
    image_size=8,
    image_channels=1,
    base_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.1,
)
OLDER_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def perturbed(unet: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Random weights everywhere, also where a fresh network has zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return unet.eval()


def write_model(folder: Path, config: TrainConfig, *, seed: int = 3) -> dict[str, Tensor]:
    folder.mkdir()
    state = perturbed(build_unet(config.model), seed).state_dict()
    write_tensors(folder, EMA_FILE, state)
    write_meta(folder, step=7, config=config, data={"location": "x", "digest": "y"}, code={})
    return state


def run(source: str, destination: Path, **knobs: Any) -> None:
    convert(ConvertConfig(source=source, destination=str(destination), **knobs))


def read(tmp_path: Path, folder: Path) -> tuple[TrainConfig, dict[str, Tensor]]:
    files = tmp_path / f"read-{folder.name}"
    files.mkdir()
    meta, tensors = fetch_model(str(folder), files)
    return meta.config, tensors


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that the real library wrote, and its network."""
    folder = tmp_path_factory.mktemp("theirs") / "ddpm-cifar10-32"
    unet = perturbed(diffusers.UNet2DModel(**CIFAR))
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder, unet


def edited(folder: Path, target: Path, part: str, **changes: Any) -> Path:
    """A copy of a folder's configs with some fields changed; weights are linked."""
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        record = json.loads((folder / name).read_text())
        (target / name).write_text(json.dumps(record | (changes if name.startswith(part) else {})))
    name = "unet/diffusion_pytorch_model.safetensors"
    (target / name).symlink_to(folder / name)
    return target


def refusal(source: str, tmp_path: Path, **knobs: Any) -> str:
    with pytest.raises(UserError) as error:
        run(source, tmp_path / "refused", **knobs)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()
    return str(error.value)


def test_an_imported_network_predicts_what_theirs_predicts_to_1e_5(theirs, tmp_path):
    folder, unet = theirs
    run(f"diffusers:{folder}", tmp_path / "ours", step=800_000)
    config, tensors = read(tmp_path, tmp_path / "ours")
    ours = build_unet(config.model, seed=9).eval()
    ours.load_state_dict(tensors, strict=True)
    x, t = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    with torch.no_grad():
        expected, got = unet(x, t).sample, ours(x, t)
    assert float(expected.std()) > 0.1
    assert float((got - expected).abs().max()) < 1e-5


def test_an_imported_model_has_the_architecture_schedule_and_variance_of_their_configs(theirs, tmp_path):
    run(f"diffusers:{theirs[0]}", tmp_path / "ours", step=800_000)
    meta, _ = fetch_model(str(tmp_path / "ours"), tmp_path)
    assert meta.step == 800_000
    assert meta.config.model == ModelConfig(
        image_size=32,
        image_channels=3,
        base_channels=64,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
    )
    assert meta.config.diffusion == ScheduleConfig(schedule="linear", T=1000, beta_start=1e-4, beta_end=0.02)
    assert (meta.config.sampling.variance, meta.config.sampling.x0_clipping) == ("fixed-large", "clip")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_flat_folder_with_the_older_names_of_attention_is_the_same_model(theirs, tmp_path, suffix):
    folder, unet = theirs
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "config.json").write_text((folder / "unet/config.json").read_text())
    (flat / "scheduler_config.json").write_text((folder / "scheduler/scheduler_config.json").read_text())
    state = {}
    for name, tensor in unet.state_dict().items():
        for new, old in OLDER_NAMES.items():
            name = name.replace(new, old)
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    if suffix == "bin":
        torch.save(state, flat / "diffusion_pytorch_model.bin")
    else:
        write_tensors(flat, "diffusion_pytorch_model.safetensors", state)
    run(f"diffusers:{folder}", tmp_path / "a")
    run(f"diffusers:{flat}", tmp_path / "b")
    assert (tmp_path / "a" / EMA_FILE).read_bytes() == (tmp_path / "b" / EMA_FILE).read_bytes()


def test_their_folder_comes_back_bit_for_bit(theirs, tmp_path):
    folder, unet = theirs
    run(f"diffusers:{folder}", tmp_path / "ours")
    run(f"model:{tmp_path / 'ours'}", tmp_path / "theirs-again")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs-again")
    expected, found = unet.state_dict(), again.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(again.scheduler.betas, diffusers.DDPMScheduler().betas)


def test_our_model_comes_back_bit_for_bit(tmp_path):
    config = TrainConfig(model=replace(SMALL, prediction="v"), diffusion=ScheduleConfig(schedule="cosine", T=400))
    written = write_model(tmp_path / "model", config)
    run(f"model:{tmp_path / 'model'}", tmp_path / "theirs")
    run(f"diffusers:{tmp_path / 'theirs'}", tmp_path / "again")
    again, tensors = read(tmp_path, tmp_path / "again")
    assert (again.model, again.diffusion, again.sampling) == (config.model, config.diffusion, config.sampling)
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], written[name]) for name in written)


@pytest.mark.parametrize(
    "diffusion",
    [
        ScheduleConfig(),
        ScheduleConfig(schedule="cosine", T=400),
        ScheduleConfig(schedule="quadratic", T=250, beta_start=3e-4),
        ScheduleConfig(schedule="sigmoid", T=77, beta_end=0.03),
        ScheduleConfig(T=1000, beta_end=0.006, allow_signal_at_T=True),
    ],
    ids=lambda config: f"{config.schedule}-{config.T}",
)
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize(("variance", "clipping"), [("fixed-large", "none"), ("fixed-small", "dynamic")])
def test_schedule_prediction_variance_and_clipping_come_back(diffusion, prediction, variance, clipping):
    sampling = SamplingConfig(variance=variance, x0_clipping=clipping, x0_percentile=0.9)
    config = TrainConfig(model=replace(SMALL, prediction=prediction), diffusion=diffusion, sampling=sampling)
    told = our_schedule(json.loads(json.dumps(their_scheduler(config))), where="here")
    made = complete(told, RecipeConfig(), TrainConfig(), "here")
    assert (made.config.diffusion, made.config.model.prediction) == (diffusion, prediction)
    assert (made.config.sampling.variance, made.config.sampling.x0_clipping) == (variance, clipping)
    assert made.notes == ()


def test_a_cosine_that_they_have_no_name_for_goes_out_as_its_betas():
    config = TrainConfig(diffusion=ScheduleConfig(schedule="cosine", T=100, cosine_s=0.02))
    scheduler = diffusers.DDPMScheduler.from_config(their_scheduler(config))
    assert torch.equal(scheduler.betas, build_schedule(config.diffusion).betas.float())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic", "sigmoid"])
@pytest.mark.parametrize("T", [50, 1000])
def test_the_exported_scheduler_has_our_betas(schedule, T):
    config = TrainConfig(diffusion=ScheduleConfig(schedule=schedule, T=T))
    scheduler = diffusers.DDPMScheduler.from_config(their_scheduler(config))
    torch.testing.assert_close(scheduler.betas.double(), build_schedule(config.diffusion).betas, rtol=2e-5, atol=1e-7)


def noise_of(shape: tuple[int, ...], num_steps: int) -> list[Tensor]:
    """x_T and the noise of every step, in the order in which a generator of this seed gives them."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator) for _ in range(num_steps + 1)]


@pytest.mark.parametrize(
    ("prediction", "schedule", "variance", "steps"),
    [
        ("eps", "linear", "fixed-large", 100),
        ("eps", "cosine", "fixed-small", 100),
        ("v", "linear", "fixed-small", 100),
        ("eps", "linear", "fixed-small", 20),
    ],
)
def test_their_pipeline_samples_an_exported_model_as_our_sampler_does(tmp_path, prediction, schedule, variance, steps):
    config = TrainConfig(
        model=replace(SMALL, prediction=prediction),
        diffusion=ScheduleConfig(schedule=schedule, T=100),
        sampling=SamplingConfig(variance=variance),
    )
    state = write_model(tmp_path / "model", config)
    run(f"model:{tmp_path / 'model'}", tmp_path / "theirs")

    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    expected = pipe(batch_size=2, num_inference_steps=steps, generator=generator, output_type="pt").images

    unet = build_unet(config.model).eval()
    unet.load_state_dict(state)
    table = build_schedule(config.diffusion)
    x_T, *noise = noise_of((2, 1, 8, 8), steps)
    with torch.no_grad():
        x_0 = ancestral(
            eps_denoiser(unet, table, prediction),
            table,
            x_T,
            timesteps=sampling_timesteps(100, steps),
            noise_at=lambda i: noise[i],
            variance=variance,
        )
    got = (x_0 / 2 + 0.5).clamp(0, 1)
    assert float(expected.std()) > 0.1
    assert float((got - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift', ours 'default'"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10, ours None"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8, ours one head of all channels (null)"),
        ({"freq_shift": 0, "flip_sin_to_cos": True}, "freq_shift is 0, ours 1; flip_sin_to_cos is True, ours False"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, ours 1e-06"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, ours for these widths 32"),
        ({"out_channels": 6}, "in_channels is 3 and out_channels 6, ours both 1 or both 3"),
        ({"block_out_channels": [64, 96, 128, 128]}, "block_out_channels is [64, 96, 128, 128], ours multiples"),
        ({"mid_block_type": None}, "mid_block_type is None, ours 'UNetMidBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "ours attends where down_block_types does"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "have SkipDownBlock2D, ours DownBlock2D"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow is not known"),
        ({"_class_name": "UNet2DConditionModel"}, "only a UNet2DModel can be our network"),
        ({"sample_size": None}, "names no sample_size; give --image-size"),
        ({"block_out_channels": "wide"}, "block_out_channels is wide; allowed are whole numbers"),
        ({"block_out_channels": 7}, "is no config of a UNet2DModel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_that_ours_cannot_be_is_refused_with_the_field(theirs, tmp_path, changes, words):
    folder = edited(theirs[0], tmp_path / "edited", "unet", **changes)
    message = refusal(f"diffusers:{folder}", tmp_path)
    assert words.replace("ours multiples", "ours are multiples") in message
    assert f"{folder}/unet/config.json" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variance_type": "learned_range"}, "variance_type is 'learned_range'; allowed are fixed_small"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'; allowed are linear"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2]; allowed is None"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; allowed is False"),
        ({"thresholding": True, "sample_max_value": 10.0}, "sample_max_value is 10.0; allowed are 1.0 (clipping) and"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value is 0.5; allowed are 1.0 (clipping) and"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_schedule_that_ours_cannot_be_is_refused_with_the_field(theirs, tmp_path, changes, words):
    folder = edited(theirs[0], tmp_path / "edited", "scheduler", **changes)
    assert words in refusal(f"diffusers:{folder}", tmp_path)


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"])
def test_other_schedulers_tell_the_schedule_and_what_they_do_not_say_is_named(theirs, tmp_path, name):
    other = getattr(diffusers, f"{name}Scheduler")(beta_start=2e-4, beta_end=0.03, beta_schedule="scaled_linear")
    folder = edited(theirs[0], tmp_path / "edited", "unet")
    other.save_pretrained(folder / "scheduler")
    made = convert(ConvertConfig(source=f"diffusers:{folder}", destination=str(tmp_path / "ours")))
    found, _ = read(tmp_path, tmp_path / "ours")
    assert found.diffusion == ScheduleConfig(schedule="quadratic", T=1000, beta_start=2e-4, beta_end=0.03)
    assert "--variance fixed-large" in made.text()
    assert ("--x0-clipping" in made.text()) == (name != "DDIM")
    assert "--schedule" not in made.text()


def test_a_scheduler_without_betas_is_refused(theirs, tmp_path):
    folder = edited(theirs[0], tmp_path / "edited", "unet")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    message = refusal(f"diffusers:{folder}", tmp_path)
    assert "_class_name is 'FlowMatchEulerDiscreteScheduler', without beta_schedule; give a DDPMScheduler" in message


def test_a_network_alone_gets_the_papers_schedule_and_the_output_says_so(theirs, tmp_path):
    theirs[1].save_pretrained(tmp_path / "unet")
    source = f"diffusers:{tmp_path / 'unet'}"
    made = convert(ConvertConfig(source=source, destination=str(tmp_path / "ours")))
    assert made.notes == (
        "assumed, as the paper has it and the source does not say: --schedule linear --T 1000 --beta-start 0.0001 "
        "--beta-end 0.02 --prediction eps --variance fixed-large --x0-clipping clip",
    )
    recipe = RecipeConfig(schedule="cosine", T=400, variance="fixed-small")
    made = convert(ConvertConfig(source=source, destination=str(tmp_path / "flags"), recipe=recipe))
    found, _ = read(tmp_path, tmp_path / "flags")
    assert found.diffusion == ScheduleConfig(schedule="cosine", T=400)
    assert found.sampling.variance == "fixed-small"
    assert made.notes[0].endswith("does not say: --prediction eps --x0-clipping clip")


def test_a_pipeline_whose_scheduler_got_lost_is_refused(theirs, tmp_path):
    theirs[1].save_pretrained(tmp_path / "lost" / "unet")
    (tmp_path / "lost" / "model_index.json").write_text("{}")
    assert "has no scheduler/scheduler_config.json" in refusal(f"diffusers:{tmp_path / 'lost'}", tmp_path)


def test_a_flag_against_the_folder_is_refused(theirs, tmp_path):
    message = refusal(f"diffusers:{theirs[0]}", tmp_path, recipe=RecipeConfig(T=500))
    assert message == f"--T 500: {theirs[0]}/scheduler/scheduler_config.json says 1000; leave the flag out"


def test_a_schedule_that_the_flags_make_impossible_is_refused(theirs, tmp_path):
    theirs[1].save_pretrained(tmp_path / "unet")
    assert "need 0 < beta_start <= beta_end < 1" in refusal(
        f"diffusers:{tmp_path / 'unet'}", tmp_path, recipe=RecipeConfig(beta_start=0.5)
    )


def test_thresholding_with_their_default_limit_is_clipping():
    config = their_scheduler(TrainConfig()) | {"thresholding": True, "sample_max_value": 1.0}
    assert our_schedule(config, where="here")["x0_clipping"] == "clip"
    assert our_schedule(config | {"sample_max_value": 1e9}, where="here")["x0_clipping"] == "dynamic"


def test_weights_of_one_variant_are_read_and_several_files_are_named(theirs, tmp_path):
    folder = edited(theirs[0], tmp_path / "edited", "unet")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    half = whole.with_name("diffusion_pytorch_model.fp16.safetensors")
    write_tensors(half.parent, half.name, {name: each.half() for name, each in theirs[1].state_dict().items()})
    whole.unlink()
    made = convert(ConvertConfig(source=f"diffusers:{folder}", destination=str(tmp_path / "ours")))
    assert "read diffusion_pytorch_model.fp16.safetensors, the only weights there" in made.text()

    half.with_name("diffusion_pytorch_model.non_ema.bin").write_bytes(b"")
    message = refusal(f"diffusers:{folder}", tmp_path)
    assert "several variants (diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.non_ema.bin)" in message
    half.rename(half.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    assert "in several files (diffusion_pytorch_model-00001-of-00002" in refusal(f"diffusers:{folder}", tmp_path)
    for path in half.parent.glob("diffusion*"):
        path.unlink()
    assert "has no diffusion_pytorch_model.safetensors and no" in refusal(f"diffusers:{folder}", tmp_path)


def test_weights_that_are_missing_left_over_or_of_another_shape_are_refused_by_name(theirs, tmp_path):
    folder, unet = theirs
    state = unet.state_dict()
    target = edited(folder, tmp_path / "edited", "unet")
    file = target / "unet/diffusion_pytorch_model.safetensors"
    cases = {
        "has no conv_out.bias": {name: tensor for name, tensor in state.items() if name != "conv_out.bias"},
        "1 weights that our network lacks: stray.weight": state | {"stray.weight": torch.zeros(1)},
        "conv_out.bias has the shape [4], our conv_out.bias takes [3]": state | {"conv_out.bias": torch.zeros(4)},
        "conv_out.bias is float64": state | {"conv_out.bias": torch.zeros(3, dtype=torch.float64)},
    }
    for words, tensors in cases.items():
        file.unlink()
        write_tensors(file.parent, file.name, tensors)
        assert words in refusal(f"diffusers:{target}", tmp_path)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    assert "has no unet/config.json" in refusal(f"diffusers:{tmp_path}", tmp_path)


def test_a_destination_that_holds_a_model_is_refused(theirs, tmp_path):
    run(f"diffusers:{theirs[0]}", tmp_path / "ours")
    with pytest.raises(UserError, match=r"holds a model \(meta.json\); choose another place or delete it"):
        run(f"diffusers:{theirs[0]}", tmp_path / "ours")


def test_a_destination_with_other_files_is_refused_and_left_alone(theirs, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\); give a new or an empty folder"):
        run(f"diffusers:{theirs[0]}", taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file; give a new"):
        run(f"diffusers:{theirs[0]}", taken / "thesis.tex")


def test_what_a_killed_import_left_is_written_again(theirs, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / EMA_FILE).write_bytes(b"half")
    run(f"diffusers:{theirs[0]}", tmp_path / "ours")
    read(tmp_path, tmp_path / "ours")


def test_a_damaged_model_is_named_by_the_place_that_was_given(tmp_path):
    write_model(tmp_path / "model", TrainConfig(model=SMALL))
    weights = tmp_path / "model" / EMA_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WorldError, match=f"^{weights} is damaged"):
        run(f"model:{tmp_path / 'model'}", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(SMALL, num_classes=10), "num_classes is 10: a DDPMPipeline tells its network no classes"),
        (replace(SMALL, base_channels=32), "normalisation layers have [16, 32] groups"),
    ],
    ids=["classes", "narrow"],
)
def test_a_network_that_no_pipeline_can_be_is_not_exported(tmp_path, model, words):
    write_model(tmp_path / "model", TrainConfig(model=model))
    assert words in refusal(f"model:{tmp_path / 'model'}", tmp_path)


def test_what_is_no_model_folder_is_not_exported(tmp_path):
    assert "is no model: give a folder with" in refusal(f"model:{tmp_path / 'nothing'}", tmp_path)
