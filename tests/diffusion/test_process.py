import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, make_schedule
from pipeline.diffusion.process import (
    PREDICTIONS,
    as_eps,
    eps_from_velocity,
    per_image,
    predict_eps,
    predict_x_0,
    q_posterior,
    q_sample,
    q_step,
    simple_loss,
    target,
    velocity,
)

T = 100


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return make_schedule(request.param, T=T)


def images(batch: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_t_single_steps_equal_one_jump(schedule: NoiseSchedule) -> None:
    """x_t is linear in x_0 and in each step's noise, so unit impulses read off every coefficient of the composition."""
    x = torch.zeros(T + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = 1  # row 0: the mean's factor of x_0; row s + 1: the factor of the noise of step s
    for step in range(T):
        noise = torch.zeros_like(x)
        noise[step + 1] = 1
        x = q_step(schedule, x, torch.full((T + 1,), step), noise)

        one, zero, t = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1), torch.tensor([step])
        jump_mean = float(q_sample(schedule, one, t, zero))
        jump_std = float(q_sample(schedule, torch.zeros_like(one), t, one))
        assert float(x[0]) == pytest.approx(jump_mean, abs=1e-12)
        assert float(x[1:].square().sum()) == pytest.approx(jump_std**2, abs=1e-12)


def test_posterior_equals_bayes_on_one_dimensional_gaussians(schedule: NoiseSchedule) -> None:
    """q(x_{t-1} | x_t, x_0) is the product of the prior N(sqrt(abar) x_0, 1 - abar) and the likelihood of x_t."""
    x_0, x_t = 0.3, -0.8
    alpha_bar_prev = 1.0
    for step, beta in enumerate(schedule.betas.tolist()):
        if step > 0:
            precision = 1 / (1 - alpha_bar_prev) + (1 - beta) / beta
            mean = (
                math.sqrt(alpha_bar_prev) * x_0 / (1 - alpha_bar_prev) + math.sqrt(1 - beta) * x_t / beta
            ) / precision
            got = q_posterior(schedule, scalar(x_0), scalar(x_t), torch.tensor([step]))
            assert float(got[0]) == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert float(got[1]) == pytest.approx(1 / precision, rel=1e-9)
            assert float(got[2]) == pytest.approx(-math.log(precision), rel=1e-9)
        alpha_bar_prev *= 1 - beta


def scalar(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_the_posterior_of_the_first_step_is_x_0_itself(schedule: NoiseSchedule) -> None:
    x_0, x_t = images(2, 0), images(2, 1)
    mean, variance, log_variance = q_posterior(schedule, x_0, x_t, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(mean, x_0, rtol=0, atol=1e-12)
    assert variance.shape == log_variance.shape == (2, 1, 1, 1)
    assert variance.unique().tolist() == [0.0]
    assert log_variance.unique().tolist() == [float(schedule.posterior_variance[1].log())]


def test_jumps_have_the_statistics_of_eq_4() -> None:
    schedule, t, n = make_schedule("linear", T=T), 30, 20_000
    eps = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x_t = q_sample(schedule, torch.full_like(eps, 0.7), torch.full((n,), t), eps)
    alpha_bar = float(schedule.alphas_cumprod[t])
    assert float(x_t.mean()) == pytest.approx(math.sqrt(alpha_bar) * 0.7, abs=4 / math.sqrt(n))
    assert float(x_t.var()) == pytest.approx(1 - alpha_bar, rel=5 * math.sqrt(2 / n))


def test_predicting_x_0_and_eps_undoes_the_jump(schedule: NoiseSchedule) -> None:
    x_0, eps, t = images(T, 2), images(T, 3), torch.arange(T)
    x_t = q_sample(schedule, x_0, t, eps)
    scale = per_image((1 / schedule.alphas_cumprod).sqrt(), x_t)
    torch.testing.assert_close(predict_x_0(schedule, x_t, t, eps) / scale, x_0 / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(predict_eps(schedule, x_t, t, x_0), eps, rtol=0, atol=1e-10)


def test_every_prediction_that_is_right_implies_the_noise_that_was_added(schedule: NoiseSchedule) -> None:
    x_0, eps, t = images(T, 2), images(T, 3), torch.arange(T)
    x_t = q_sample(schedule, x_0, t, eps)
    for prediction in PREDICTIONS:
        implied = as_eps(prediction, schedule, x_t, t, target(prediction, schedule, x_0, t, eps))
        torch.testing.assert_close(implied, eps, rtol=0, atol=1e-10)


def test_the_velocity_is_x_t_turned_by_a_right_angle(schedule: NoiseSchedule) -> None:
    """(x_t, v) is a rotation of (x_0, eps): lengths stay, and v is the derivative of x_t by the angle."""
    x_0, eps, t = images(T, 2), images(T, 3), torch.arange(T)
    x_t, v = q_sample(schedule, x_0, t, eps), velocity(schedule, x_0, t, eps)
    torch.testing.assert_close(x_t.square() + v.square(), x_0.square() + eps.square(), rtol=1e-12, atol=0)
    angle = per_image(torch.atan2((1 - schedule.alphas_cumprod).sqrt(), schedule.alphas_cumprod.sqrt()), x_0)
    ahead, behind = (angle + h for h in (1e-5, -1e-5))
    derivative = ((ahead.cos() - behind.cos()) * x_0 + (ahead.sin() - behind.sin()) * eps) / 2e-5
    torch.testing.assert_close(v, derivative, rtol=0, atol=1e-8)


def test_an_error_of_v_is_never_enlarged_on_its_way_to_eps(schedule: NoiseSchedule) -> None:
    x_t, t = images(T, 2), torch.arange(T)
    moved = eps_from_velocity(schedule, x_t, t, torch.ones_like(x_t)) - eps_from_velocity(schedule, x_t, t, 0 * x_t)
    torch.testing.assert_close(moved[:, 0, 0, 0], schedule.alphas_cumprod.sqrt(), rtol=1e-12, atol=1e-14)


def test_an_unknown_prediction_is_a_programming_error(schedule: NoiseSchedule) -> None:
    x, t = images(2, 0), torch.tensor([0, 1])
    with pytest.raises(AssertionError, match="epsilon"):
        target("epsilon", schedule, x, t, x)
    with pytest.raises(AssertionError, match="epsilon"):
        as_eps("epsilon", schedule, x, t, x)


def test_each_image_of_a_batch_has_its_own_t(schedule: NoiseSchedule) -> None:
    x_0, eps, t = images(3, 4), images(3, 5), torch.tensor([0, 42, T - 1])
    together = q_sample(schedule, x_0, t, eps)
    alone = [q_sample(schedule, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_coefficients_are_cast_after_the_square_root() -> None:
    """In half precision 1 - alpha_bar_0 = 1e-4 would become 0 or 1e-3; the coefficient 0.01 stays 0.01."""
    schedule = make_schedule("linear", T=1000)
    zeros, ones = torch.zeros(1, 1, 1, 1, dtype=torch.float16), torch.ones(1, 1, 1, 1, dtype=torch.float16)
    x_t = q_sample(schedule, zeros, torch.tensor([0]), ones)
    assert x_t.dtype == torch.float16
    assert float(x_t) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_have_the_dtype_of_the_images(dtype: torch.dtype) -> None:
    schedule, t = make_schedule("cosine", T=T), torch.tensor([1, 50])
    x, eps = images(2, 6, torch.float32).to(dtype), images(2, 7, torch.float32).to(dtype)
    results = [
        f(schedule, x, t, eps) for f in (q_step, q_sample, predict_x_0, predict_eps, velocity, eps_from_velocity)
    ]
    results += q_posterior(schedule, x, eps, t)
    assert {result.dtype for result in results} == {dtype}


def test_the_velocity_at_the_first_step_keeps_its_digits_in_half_precision_and_under_autocast() -> None:
    """v = -sqrt(1 - alpha_bar) x_0 = -0.01 for a white image without noise; 1 - alpha_bar is no bfloat16 number."""
    schedule, t = make_schedule("linear", T=1000), torch.tensor([0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ones = torch.ones(1, 1, 1, 1, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = velocity(schedule, ones, t, torch.zeros_like(ones))
        assert v.dtype == dtype
        assert float(v) == pytest.approx(-0.01, rel=4e-3)


def test_the_simple_loss_is_the_mean_square_of_each_image() -> None:
    eps, eps_hat = images(2, 8), images(2, 9)
    loss = simple_loss(eps, eps_hat)
    expected = [
        sum((a - b) ** 2 for a, b in zip(eps[i].flatten(), eps_hat[i].flatten(), strict=True)) / 48 for i in (0, 1)
    ]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=0)


def test_the_simple_loss_of_half_precision_predictions_is_float32() -> None:
    eps, eps_hat = images(2, 8, torch.float32), images(2, 9, torch.float32).bfloat16()
    assert simple_loss(eps, eps_hat).dtype == torch.float32
