"""Our mathematics beside an implementation written by others: Hugging Face diffusers."""

import re

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.process import q_sample
from pipeline.diffusion.samplers import ancestral, ddim
from pipeline.diffusion.solvers import dpm_solver_pp_2m
from pipeline.diffusion.timesteps import sampling_timesteps
from pipeline.diffusion.unet import UNet

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 8, 8)
RENAMED = (
    (r"time_embedding\.dense(\d)", r"time_embedding.linear_\1"),
    (r"norm_out", "conv_norm_out"),
    (r"(down|up)\.(\d)\.blocks\.(\d)\.res\.", r"\1_blocks.\2.resnets.\3."),
    (r"(down|up)\.(\d)\.blocks\.(\d)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"(down|up)\.(\d)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"mid\.(\d)\.res\.", r"mid_block.resnets.\1."),
    (r"mid\.(\d)\.attention\.", r"mid_block.attentions.\1."),
    (r"time_proj", "time_emb_proj"),
    (r"shortcut", "conv_shortcut"),
    (r"(attentions\.\d)\.norm", r"\1.group_norm"),
    (r"proj_out", "to_out.0"),
)


def their_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def our_state(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names; their linear q, k, v are our one 1x1 convolution."""
    state, used = {}, set()
    for name, own in ours.items():
        key = their_name(name)
        keys = [key.replace("qkv", f"to_{part}") for part in "qkv"] if "qkv" in key else [key]
        used.update(keys)
        state[name] = torch.cat([theirs[k] for k in keys]).reshape(own.shape)
    assert used == set(theirs)
    return state


def twins() -> tuple[torch.nn.Module, UNet]:
    """Their network in the layout of google/ddpm-cifar10-32, thinner, and ours with its weights."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
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
        norm_num_groups=32,
        act_fn="silu",
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = UNet(image_size=32, base_channels=64, channel_mult=(1, 2, 2, 2)).eval()
    ours.load_state_dict(our_state(theirs.state_dict(), ours.state_dict()))
    return theirs, ours


def test_the_unet_predicts_what_theirs_predicts_with_the_same_weights() -> None:
    theirs, ours = twins()
    x, t = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    with torch.no_grad():
        expected, got = theirs(x, t).sample, ours(x, t)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def wavy_denoiser(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t + 0.1 * t[:, None, None, None]) + 0.3 * x_t


def their_config(schedule: NoiseSchedule) -> dict[str, object]:
    return {"num_train_timesteps": schedule.T, "trained_betas": schedule.betas.numpy(), "clip_sample": True}


def noises(num_steps: int, seed: int = 4) -> list[Tensor]:
    """x_T and the noise of every step, in the order in which a generator of this seed gives them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(num_steps + 1)]


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_at_a_thousand_steps_are_theirs(name: str, theirs: str) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)
    torch.testing.assert_close(make_schedule(name, T=1000).betas.float(), scheduler.betas, rtol=1e-4, atol=1e-6)


def test_noised_images_are_theirs() -> None:
    schedule = make_schedule("linear", T=1000)
    scheduler = diffusers.DDPMScheduler(**their_config(schedule))
    x_0, eps, t = *noises(1), torch.tensor([3, 870])
    torch.testing.assert_close(q_sample(schedule, x_0, t, eps), scheduler.add_noise(x_0, eps, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [50, 13, 2])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_ancestral_sampling_equals_their_ddpm_scheduler(variance: str, num_steps: int) -> None:
    """From two steps on: they add noise whenever t > 0, so a single step from T - 1 would end in noise."""
    schedule = make_schedule("linear", T=50)
    scheduler = diffusers.DDPMScheduler(**their_config(schedule), variance_type=variance.replace("-", "_"))
    timesteps = sampling_timesteps(50, num_steps)
    scheduler.set_timesteps(timesteps=timesteps)

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SHAPE, generator=generator)
    for t in timesteps:
        x = scheduler.step(wavy_denoiser(x, torch.tensor([t, t])), t, x, generator=generator).prev_sample

    x_T, *noise = noises(num_steps)
    got = ancestral(wavy_denoiser, schedule, x_T, timesteps=timesteps, noise_at=lambda i: noise[i], variance=variance)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [50, 13, 3, 2])
def test_dpm_solver_equals_their_multistep_scheduler_of_second_order(num_steps: int) -> None:
    schedule = make_schedule("linear", T=50)
    options = {"trained_betas": schedule.betas.numpy(), "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=50, solver_order=2, **options)
    timesteps = sampling_timesteps(50, num_steps)
    scheduler.set_timesteps(timesteps=timesteps)
    x_T, *_ = noises(1)
    x = x_T
    for t in timesteps:
        x = scheduler.step(wavy_denoiser(x, torch.tensor([t, t])), t, x).prev_sample
    got = dpm_solver_pp_2m(wavy_denoiser, schedule, x_T, timesteps=timesteps, limit_x_0=None)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("num_steps", [50, 10, 5])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_sampling_equals_their_ddim_scheduler_where_its_stride_divides_T(eta: float, num_steps: int) -> None:
    """Their previous step is t - T // n, so they agree with the sequence (and with us) only when n divides T."""
    schedule = make_schedule("linear", T=50)
    scheduler = diffusers.DDIMScheduler(**their_config(schedule), timestep_spacing="leading")
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()

    x, *noise = x_T, *_ = noises(num_steps)
    for i, t in enumerate(timesteps):
        eps_hat = wavy_denoiser(x, torch.tensor([t, t]))
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise[i] if eta > 0 else None}
        x = scheduler.step(eps_hat, t, x, **options).prev_sample

    got = ddim(wavy_denoiser, schedule, x_T, timesteps=timesteps, noise_at=lambda i: noise[i], eta=eta)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)
