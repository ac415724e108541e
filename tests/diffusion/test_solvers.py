"""Solvers of the probability-flow ODE against its solution on a Gaussian mixture, whose score is known."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.samplers import SAMPLERS, ddim
from pipeline.diffusion.solvers import dpm_solver_pp_2m, heun, heun_grid
from pipeline.diffusion.stepping import Denoiser, dynamic_threshold
from pipeline.diffusion.timesteps import spaced_timesteps

MEANS, STDS, WEIGHTS = (torch.tensor(v).double() for v in ([-0.8, 0.1, 0.7], [0.05, 0.2, 0.1], [0.3, 0.45, 0.25]))


def mixture_x_0(z: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | z = x_0 + sigma * eps] for the mixture: each component's posterior mean by its responsibility."""
    z, variance = z[..., None], STDS.square() + sigma[..., None] ** 2
    log_density = WEIGHTS.log() - (z - MEANS).square() / variance / 2 - variance.log() / 2
    posterior_mean = MEANS + STDS.square() / variance * (z - MEANS)
    return (log_density.softmax(-1) * posterior_mean).sum(-1)


def mixture_denoiser(schedule: NoiseSchedule) -> Denoiser:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[t][:, None, None, None]
        z, sigma = x_t / alpha_bar.sqrt(), ((1 - alpha_bar) / alpha_bar).sqrt()
        return ((z - mixture_x_0(z.double(), sigma)) / sigma).to(x_t.dtype)

    return denoise


@cache
def fine_schedule() -> NoiseSchedule:
    """So fine that rounding to whole steps does not show beside the solvers' own errors."""
    return make_schedule("linear", T=20_000)


X_T = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None, None, None]


@cache
def exact() -> Tensor:
    """Runge-Kutta of fourth order in log sigma down to the schedule's first step, then x_0 as all samplers end."""
    alpha_bar = fine_schedule().alphas_cumprod
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    grid = torch.linspace(math.log(sigma[-1]), math.log(sigma[0]), 801, dtype=torch.float64)

    def slope(u: Tensor, z: Tensor) -> Tensor:
        return z - mixture_x_0(z, u.exp().expand_as(z))

    z = X_T / alpha_bar[-1].sqrt()
    for u, v in pairwise(grid):
        h = v - u
        a = slope(u, z)
        b = slope(u + h / 2, z + h / 2 * a)
        c = slope(u + h / 2, z + h / 2 * b)
        d = slope(v, z + h * c)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
    return mixture_x_0(z, sigma[0].expand_as(z))


@pytest.mark.parametrize(("name", "order"), [("ddim", 0.8), ("heun", 1.7), ("dpm-solver++", 1.7)])
def test_the_error_on_a_gaussian_mixture_falls_with_the_order_of_the_solver(name: str, order: float) -> None:
    schedule = fine_schedule()
    errors = []
    for num_steps in (40, 80, 160):
        timesteps = spaced_timesteps(schedule, num_steps, "logsnr")
        options = {"timesteps": timesteps, "noise_at": no_noise, "limit_x_0": None}
        errors.append(
            float((SAMPLERS[name](mixture_denoiser(schedule), schedule, X_T, **options) - exact()).abs().mean())
        )
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert min(orders) >= order
    assert errors[-1] < 10 ** (-2 if name == "ddim" else -3)


def no_noise(i: int) -> Tensor:
    raise AssertionError(f"noise of step {i} was asked for")


@pytest.mark.parametrize("name", ["dpm-solver++", "heun"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_images_keep_their_type_and_stay_in_range_when_clipped(name: str, dtype: torch.dtype) -> None:
    schedule = make_schedule("cosine", T=1000)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    timesteps = spaced_timesteps(schedule, 8, "logsnr")
    x_0 = SAMPLERS[name](lambda x, t: torch.sin(3 * x), schedule, x_T, timesteps=timesteps, noise_at=no_noise)
    assert (x_0.dtype, x_0.shape) == (dtype, x_T.shape)
    assert float(x_0.abs().max()) <= 1


@pytest.mark.parametrize("num_evaluations", [1, 2, 3, 4, 9, 10, 50])
def test_heun_spends_exactly_the_network_evaluations_that_are_given(num_evaluations: int) -> None:
    schedule, seen = make_schedule("linear", T=100), []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert (t.dtype, len(t.unique())) == (torch.int64, 1)
        seen.append(int(t[0]))
        return 0.1 * x_t

    num_timesteps, num_corrected = heun_grid(num_evaluations)
    timesteps = spaced_timesteps(schedule, num_timesteps, "logsnr")
    heun(denoise, schedule, X_T, timesteps=timesteps, num_corrected=num_corrected)
    assert len(seen) == num_evaluations
    assert sorted(set(seen), reverse=True) == timesteps


def test_without_corrections_heun_is_deterministic_ddim() -> None:
    schedule = make_schedule("cosine", T=200)
    timesteps = spaced_timesteps(schedule, 12, "quadratic")
    denoise = mixture_denoiser(schedule)
    plain = ddim(denoise, schedule, X_T, timesteps=timesteps, noise_at=no_noise)
    torch.testing.assert_close(
        heun(denoise, schedule, X_T, timesteps=timesteps, num_corrected=0), plain, rtol=0, atol=1e-9
    )


def test_two_steps_of_dpm_solver_are_those_of_ddim_since_only_later_ones_have_a_predecessor() -> None:
    schedule = make_schedule("linear", T=200)
    denoise, timesteps = mixture_denoiser(schedule), [199, 0]
    plain = ddim(denoise, schedule, X_T, timesteps=timesteps, noise_at=no_noise)
    torch.testing.assert_close(dpm_solver_pp_2m(denoise, schedule, X_T, timesteps=timesteps), plain, rtol=0, atol=1e-9)


def test_dynamic_thresholding_leaves_images_in_range_alone_and_scales_the_others_by_their_percentile() -> None:
    quiet = torch.linspace(-0.9, 0.9, 100).reshape(1, 1, 10, 10)
    loud = torch.linspace(-3, 3, 100).reshape(1, 1, 10, 10)
    limited = dynamic_threshold(0.9)(torch.cat([quiet, loud]))
    assert torch.equal(limited[:1], quiet)
    s = loud.abs().flatten().sort().values[89]
    torch.testing.assert_close(limited[1:], loud.clamp(-s, s) / s)
    assert float(limited.abs().max()) == 1
