from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.samplers import SAMPLERS, ancestral, ddim
from pipeline.diffusion.stepping import Denoiser, clip
from pipeline.diffusion.timesteps import sampling_timesteps
from pipeline.errors import UserError


def noise_table(num_steps: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 11) -> Callable[[int], Tensor]:
    table = torch.randn(num_steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return lambda i: table[i]


def no_noise(i: int) -> Tensor:
    raise AssertionError(f"noise of step {i} was asked for")


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, std: float) -> Denoiser:
    """E[eps | x_t] for data N(mean, std^2), from the joint Gaussian of eps and x_t; std 0 is a point mass."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[t][:, None, None, None]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return ((1 - alpha_bar).sqrt() / variance * (x_t - alpha_bar.sqrt() * mean)).to(x_t.dtype)

    return denoise


def wavy_denoiser(x_t: Tensor, t: Tensor) -> Tensor:
    """Nothing in particular, but smooth, and different for every x_t and t."""
    return torch.sin(3 * x_t + 0.1 * t[:, None, None, None]) + 0.3 * x_t


def test_sampling_timesteps_are_distinct_descending_and_reach_both_ends_for_every_T_and_number() -> None:
    for T in range(1, 61):
        for num_steps in range(1, T + 1):
            steps = sampling_timesteps(T, num_steps)
            assert len(steps) == num_steps
            assert steps == sorted(set(steps), reverse=True)
            assert steps[0] == T - 1
            if num_steps >= 2:
                assert steps[-1] == 0
                gaps = [a - b for a, b in pairwise(steps)]
                assert max(gaps) - min(gaps) <= 1


def test_all_timesteps_are_every_step() -> None:
    assert sampling_timesteps(1000, 1000) == list(range(999, -1, -1))
    assert sampling_timesteps(1000, 3) == [999, 500, 0]


@pytest.mark.parametrize("num_steps", [0, -1, 101])
def test_a_number_of_steps_outside_one_to_T_is_refused(num_steps: int) -> None:
    with pytest.raises(UserError, match=f"num_steps={num_steps} with T=100"):
        sampling_timesteps(100, num_steps)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("clip_x_0", [True, False])
def test_ddim_with_eta_one_at_all_steps_equals_ancestral_fixed_small(
    dtype: torch.dtype, tolerance: float, clip_x_0: bool
) -> None:
    schedule = make_schedule("linear", T=100)
    denoise = wavy_denoiser if clip_x_0 else gaussian_denoiser(schedule, 0.2, 0.5)
    noise_at = noise_table(101, (2, 3, 4, 4), dtype)
    options = {"timesteps": sampling_timesteps(100, 100), "noise_at": noise_at, "limit_x_0": clip if clip_x_0 else None}
    small = ancestral(denoise, schedule, noise_at(100), variance="fixed-small", **options)
    eta_one = ddim(denoise, schedule, noise_at(100), eta=1.0, **options)
    assert small.dtype == dtype
    assert float(small.std()) > 0.05
    torch.testing.assert_close(eta_one, small, rtol=0, atol=tolerance)


def test_ddim_with_eta_one_equals_ancestral_fixed_small_on_a_respaced_schedule_too() -> None:
    schedule, noise_at = make_schedule("cosine", T=100), noise_table(8, (2, 3, 4, 4), torch.float64)
    options = {"timesteps": sampling_timesteps(100, 7), "noise_at": noise_at}
    small = ancestral(wavy_denoiser, schedule, noise_at(7), variance="fixed-small", **options)
    torch.testing.assert_close(
        ddim(wavy_denoiser, schedule, noise_at(7), eta=1.0, **options), small, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize(
    "options",
    [
        ("ddpm", {"variance": "fixed-small"}),
        ("ddpm", {"variance": "fixed-large"}),
        ("ddim", {"eta": 0.5}),
        ("dpm-solver++", {}),
        ("heun", {}),
    ],
)
def test_the_true_noise_of_a_point_leads_to_the_point(options: tuple[str, dict[str, object]], num_steps: int) -> None:
    schedule, noise_at = make_schedule("linear", T=100), noise_table(101, (2, 1, 2, 2), torch.float64)
    name, extra = options
    x_0 = SAMPLERS[name](
        gaussian_denoiser(schedule, mean=0.37, std=0.0),
        schedule,
        noise_at(100),
        timesteps=sampling_timesteps(100, num_steps),
        noise_at=noise_at,
        **extra,
    )
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.37), rtol=0, atol=1e-10)


def moments(sample: Callable[..., Tensor], T: int, mean: float, std: float, **options: object) -> tuple[float, float]:
    """Mean and variance of what a sampler draws from Gaussian data, without drawing.

    With Gaussian data every sampler is affine in x_T and in each step's noise: a batch of unit impulses reads off the
    factor of each, and the variance is the sum of their squares.
    """
    schedule = make_schedule("linear", T=T)
    impulses = torch.cat([torch.zeros(1, T + 1), torch.eye(T + 1)]).double()[:, :, None, None, None]
    out = sample(
        gaussian_denoiser(schedule, mean, std),
        schedule,
        impulses[:, T],
        timesteps=sampling_timesteps(T, T),
        noise_at=lambda i: impulses[:, i],
        limit_x_0=None,
        **options,
    ).flatten()
    return float(out[0]), float((out[1:] - out[0]).square().sum())


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_ddim_draws_the_mean_and_variance_of_gaussian_data(std: float) -> None:
    mean, variance = moments(ddim, 400, 0.4, std)
    assert mean == pytest.approx(0.4, abs=0.02)
    assert variance == pytest.approx(std**2, rel=0.03)


def test_ancestral_fixed_large_is_exact_for_data_of_unit_variance() -> None:
    """DDPM Sec. 3.2: beta_t is the optimal variance for x_0 ~ N(0, I)."""
    mean, variance = moments(ancestral, 400, 0.0, 1.0, variance="fixed-large")
    assert mean == pytest.approx(0.0, abs=1e-12)
    # The last step adds no noise: its share, beta_0, is all that is missing.
    assert variance == pytest.approx(1.0, abs=2 * float(make_schedule("linear", T=400).betas[0]))


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_ancestral_draws_the_mean_and_variance_of_gaussian_data(variance: str) -> None:
    mean, drawn = moments(ancestral, 400, 0.4, 0.7, variance=variance)
    assert mean == pytest.approx(0.4, abs=0.02)
    assert drawn == pytest.approx(0.49, rel=0.06)


def test_drawn_samples_have_the_moments_of_the_data() -> None:
    schedule, shape = make_schedule("cosine", T=200), (40, 1, 16, 16)
    noise_at = noise_table(201, shape, torch.float32, seed=3)
    x_0 = ancestral(
        gaussian_denoiser(schedule, 0.3, 0.4),
        schedule,
        noise_at(200),
        timesteps=sampling_timesteps(200, 200),
        noise_at=noise_at,
        limit_x_0=None,
        variance="fixed-small",
    )
    assert float(x_0.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x_0.std()) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("num_steps", [1, 5, 50])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_clipping_keeps_samples_in_range_and_not_clipping_does_not(name: str, num_steps: int) -> None:
    schedule, noise_at = make_schedule("linear", T=50), noise_table(51, (2, 3, 4, 4), torch.float32)
    options = {"timesteps": sampling_timesteps(50, num_steps), "noise_at": noise_at}
    clipped = SAMPLERS[name](wavy_denoiser, schedule, noise_at(50), **options)
    free = SAMPLERS[name](wavy_denoiser, schedule, noise_at(50), limit_x_0=None, **options)
    assert float(clipped.abs().max()) <= 1
    assert float(free.abs().max()) > 1


def test_deterministic_ddim_never_asks_for_noise() -> None:
    schedule = make_schedule("linear", T=50)
    x_T = torch.ones(1, 3, 4, 4)
    x_0 = ddim(wavy_denoiser, schedule, x_T, timesteps=sampling_timesteps(50, 10), noise_at=no_noise)
    assert x_0.shape == x_T.shape


@pytest.mark.parametrize(("name", "extra"), [("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_the_last_step_asks_for_no_noise(name: str, extra: dict[str, float]) -> None:
    asked: list[int] = []

    def noise_at(i: int) -> Tensor:
        asked.append(i)
        return torch.ones(1, 3, 4, 4)

    timesteps = sampling_timesteps(50, 10)
    SAMPLERS[name](
        wavy_denoiser, make_schedule("linear", T=50), noise_at(0), timesteps=timesteps, noise_at=noise_at, **extra
    )
    assert asked[1:] == list(range(9))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_network_sees_exactly_the_given_timesteps_as_int64(name: str) -> None:
    seen: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(t)
        return torch.zeros_like(x_t)

    x_T = torch.zeros(2, 3, 4, 4, requires_grad=True)
    timesteps = sampling_timesteps(50, 7)
    SAMPLERS[name](
        denoise, make_schedule("linear", T=50), x_T, timesteps=timesteps, noise_at=lambda i: torch.zeros_like(x_T)
    )
    assert [t.tolist() for t in seen] == [[step, step] for step in timesteps]
    assert all(t.dtype == torch.int64 for t in seen)


def test_an_image_does_not_depend_on_its_batch() -> None:
    schedule, noise_at = make_schedule("linear", T=50), noise_table(51, (4, 3, 4, 4), torch.float64)
    timesteps = sampling_timesteps(50, 20)
    together = ancestral(wavy_denoiser, schedule, noise_at(50), timesteps=timesteps, noise_at=noise_at)
    alone = ancestral(
        wavy_denoiser, schedule, noise_at(50)[2:3], timesteps=timesteps, noise_at=lambda i: noise_at(i)[2:3]
    )
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)


def test_unknown_variances_and_etas_out_of_range_are_refused() -> None:
    schedule, x_T = make_schedule("linear", T=50), torch.zeros(1, 3, 4, 4)
    with pytest.raises(UserError, match="unknown variance 'learned': use one of fixed-small, fixed-large"):
        ancestral(wavy_denoiser, schedule, x_T, timesteps=[0], noise_at=no_noise, variance="learned")
    with pytest.raises(UserError, match=r"eta=1.5: use a value in \[0, 1\]"):
        ddim(wavy_denoiser, schedule, x_T, timesteps=[0], noise_at=no_noise, eta=1.5)


@pytest.mark.parametrize("timesteps", [[], [0, 1], [3, 3, 0], [50, 0], [4, -1]])
def test_timesteps_that_do_not_descend_within_range_are_a_programming_error(timesteps: list[int]) -> None:
    with pytest.raises(AssertionError, match="timesteps must"):
        ddim(
            wavy_denoiser,
            make_schedule("linear", T=50),
            torch.zeros(1, 3, 4, 4),
            timesteps=timesteps,
            noise_at=no_noise,
        )
