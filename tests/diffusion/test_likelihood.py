"""The variational bound against Gaussian data, whose terms are known in closed form or by quadrature."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.likelihood import (
    bound_term,
    discretized_log_likelihood,
    prior_term,
    stratified_timesteps,
)
from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.stepping import Denoiser
from pipeline.errors import UserError

MEAN, STD = 0.1, 0.25
LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def gaussian_denoiser(schedule: NoiseSchedule) -> Denoiser:
    """E[eps | x_t] for data N(MEAN, STD^2)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[t][:, None, None, None]
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() / variance * (x_t - alpha_bar.sqrt() * MEAN)

    return denoise


def level_probabilities() -> Tensor:
    """Of the grey levels under N(MEAN, STD^2)."""
    edges = torch.cat([LEVELS[:1] - 9, (LEVELS[1:] + LEVELS[:-1]) / 2, LEVELS[-1:] + 9])
    return torch.special.ndtr((edges - MEAN) / STD).diff()


def draw(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of grey levels with the data's probabilities, [count, 1, 8, 8], and noise."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(level_probabilities(), count * 64, replacement=True, generator=generator)
    noise = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return LEVELS[index].reshape(count, 1, 8, 8), noise


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
@pytest.mark.parametrize("t", [1, 10, 60, 99])
def test_the_term_of_a_step_is_the_closed_form_of_the_optimal_denoiser(t: int, variance: str) -> None:
    """KL of two Gaussians whose means differ by c (x_0 - E[x_0 | x_t]); the square's mean is Var(x_0 | x_t)."""
    schedule = make_schedule("linear", T=100)
    q = float(schedule.posterior_variance[t])
    p = q if variance == "fixed-small" else float(schedule.betas[t])
    alpha_bar, c = float(schedule.alphas_cumprod[t]), float(schedule.posterior_mean_coef_x0[t])
    left = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    expected = 0.5 * (math.log(p / q) - 1 + q / p + c**2 * left / p) / math.log(2)
    x_0, eps = draw(2000, seed=t)
    steps = torch.full((2000,), t)
    found = bound_term(gaussian_denoiser(schedule), schedule, x_0, steps, eps, variance=variance, limit_x_0=None)
    assert (found.shape, found.dtype) == ((2000,), torch.float64)
    assert float(found.mean()) == pytest.approx(expected, rel=0.02)


def test_the_decoder_is_the_double_integral_over_grey_levels_and_noise() -> None:
    schedule = make_schedule("linear", T=100)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    alpha_bar, std = float(schedule.alphas_cumprod[0]), float(schedule.posterior_variance[1]) ** 0.5
    z = alpha_bar**0.5 * LEVELS[:, None] + (1 - alpha_bar) ** 0.5 * torch.from_numpy(nodes)
    # At the first step the posterior mean is x_0_hat itself.
    mean = MEAN + alpha_bar**0.5 * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar) * (z - alpha_bar**0.5 * MEAN)
    edges = [torch.special.ndtr((LEVELS[:, None] + side / 255 - mean) / std) for side in (1, -1)]
    nats = -(edges[0] - edges[1]).clamp(min=1e-12).log()[1:-1] @ torch.from_numpy(weights / weights.sum())
    expected = float((level_probabilities()[1:-1] * nats).sum()) / math.log(2)
    x_0, eps = draw(3000)
    steps = torch.zeros(3000, dtype=torch.int64)
    found = bound_term(gaussian_denoiser(schedule), schedule, x_0, steps, eps, variance="fixed-small", limit_x_0=None)
    assert float(found.mean()) == pytest.approx(expected, rel=0.01)


def test_the_prior_is_the_divergence_from_a_standard_normal() -> None:
    schedule = make_schedule("linear", T=20, beta_end=0.01, allow_signal_at_T=True)
    x_0, _ = draw(3)
    alpha_bar = float(schedule.alphas_cumprod[-1])
    q = torch.distributions.Normal(alpha_bar**0.5 * x_0, (1 - alpha_bar) ** 0.5)
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(prior_term(schedule, x_0), divergence.mean((1, 2, 3)) / math.log(2))


def test_the_whole_bound_lies_just_above_the_entropy_of_the_data() -> None:
    """The bound of the optimal denoiser: never below the entropy of the grey levels, and near it with many steps."""
    p = level_probabilities()
    entropy = -float((p * p.log2()).sum())
    excess = []
    for T in (100, 1000):
        schedule = make_schedule("linear", T=T)
        x_0, _ = draw(60, seed=T)
        steps, weights = stratified_timesteps(torch.rand(60, T - 1, generator=torch.Generator().manual_seed(1)), T, 1)
        total = prior_term(schedule, x_0)
        for column, weight in zip(steps.T, weights, strict=True):
            eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(int(column[0]))).double()
            term = bound_term(
                gaussian_denoiser(schedule), schedule, x_0, column, eps, variance="fixed-small", limit_x_0=None
            )
            total = total + weight * term
        # The data's own log likelihood on these images takes most of the sampling error away.
        index = ((x_0 + 1) * 127.5).round().long()
        excess.append(float((total + p.log2()[index].mean((1, 2, 3))).mean()))
    # With few steps the decoder alone is coarse: sqrt(beta_1) = 0.03 is four grey levels.
    assert 0 < excess[1] < excess[0]
    assert excess[1] < 0.15 * entropy


def test_probabilities_of_all_grey_levels_add_up_to_one() -> None:
    for mean, std in ((0.0, 0.01), (0.99, 0.3), (-1.2, 0.05)):
        log_p = discretized_log_likelihood(LEVELS, torch.full((256,), mean).double(), torch.tensor(std).double())
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("T", "stride"), [(100, 1), (100, 7), (100, 99), (100, 500), (2, 1)])
def test_strided_steps_are_within_their_runs_and_their_weights_add_up_to_all_steps(T: int, stride: int) -> None:
    runs = math.ceil((T - 1) / stride)
    for uniform in (torch.zeros(2, runs), torch.full((2, runs), 1 - 2**-24)):
        steps, weights = stratified_timesteps(uniform, T, stride)
        assert steps[:, 0].tolist() == [0, 0]
        assert 1 <= int(steps[:, 1:].min()) <= int(steps.max()) <= T - 1
        assert float(weights.sum()) == T
    if stride == 1:
        assert steps[0].tolist() == list(range(T))


def test_strided_terms_have_the_whole_sum_as_their_mean() -> None:
    terms = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    uniform = torch.rand(40_000, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps, weights = stratified_timesteps(uniform, 50, 5)
    estimates = (terms[steps] * weights).sum(1)
    assert float(estimates.mean()) == pytest.approx(float(terms.sum()), rel=5e-3)


def test_an_unknown_variance_is_refused() -> None:
    schedule, (x_0, eps) = make_schedule("linear", T=100), draw(1)
    with pytest.raises(UserError, match="unknown variance 'learned'"):
        bound_term(gaussian_denoiser(schedule), schedule, x_0, torch.tensor([0]), eps, variance="learned")
