import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.noise_schedule import SCHEDULES, NoiseSchedule, make_schedule
from pipeline.diffusion.process import PREDICTIONS, predict_x_0, q_sample, simple_loss, target
from pipeline.diffusion.weighting import loss_weights

T = 100


def images(seed: int) -> Tensor:
    return torch.randn(T, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_alphas_cumprod(values: list[float]) -> NoiseSchedule:
    """A schedule that no one trains with: alpha_bar 0 and 1 included."""
    tables = {name: torch.zeros(len(values), dtype=torch.float64) for name in NoiseSchedule.__dataclass_fields__}
    return NoiseSchedule(**tables | {"alphas_cumprod": torch.tensor(values, dtype=torch.float64)})


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr_gives_predictions_of_eps_v_and_x_0_by_the_same_network_the_same_loss(name: str, gamma: float) -> None:
    """One wrong x_0, told as itself, as eps and as v: squared errors of 1, SNR and SNR + 1 times that of x_0."""
    schedule, t = make_schedule(name, T=T), torch.arange(T)
    x_0, eps, x_0_hat = images(0), images(1), images(2)
    x_t = q_sample(schedule, x_0, t, eps)
    alpha_bar = schedule.alphas_cumprod[:, None, None, None]
    eps_hat = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
    told = {"eps": eps_hat, "x_0": x_0_hat, "v": alpha_bar.sqrt() * eps_hat - (1 - alpha_bar).sqrt() * x_0_hat}
    torch.testing.assert_close(predict_x_0(schedule, x_t, t, eps_hat), x_0_hat, rtol=1e-6, atol=1e-6)

    error = (x_0 - x_0_hat).square().mean(dim=(1, 2, 3))
    expected = schedule.snr.clamp(max=gamma) * error
    for prediction in PREDICTIONS:
        weights = loss_weights("min-snr", prediction, schedule, t, gamma=gamma)
        assert weights is not None
        assert weights.dtype == torch.float64
        loss = weights * simple_loss(target(prediction, schedule, x_0, t, eps), told[prediction])
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_weights_are_hang_et_al_s_at_a_signal_to_noise_ratio_of_20_1_and_a_quarter() -> None:
    schedule, t = with_alphas_cumprod([20 / 21, 1 / 2, 1 / 5]), torch.tensor([2, 1, 0])
    for prediction, expected in {
        "eps": [1, 1, 5 / 20],
        "v": [1 / 5, 1 / 2, 5 / 21],
        "x_0": [1 / 4, 1, 5],
    }.items():
        weights = loss_weights("min-snr", prediction, schedule, t)
        assert weights is not None
        assert weights.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_without_any_noise_and_without_any_signal(prediction: str) -> None:
    schedule = with_alphas_cumprod([1.0, 1 - 1e-16, 1e-300, 5e-324, 0.0])
    weights = loss_weights("min-snr", prediction, schedule, torch.arange(5))
    assert weights is not None
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights.tolist())
    no_noise, no_signal = {"eps": (0, 1), "v": (0, 0), "x_0": (5, 0)}[prediction]
    assert (weights[0], weights[-1]) == (no_noise, no_signal)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_simple_loss_has_no_weights(prediction: str) -> None:
    assert loss_weights("simple", prediction, make_schedule("linear", T=T), torch.arange(T)) is None


def test_without_a_clamp_the_weighted_loss_of_eps_is_the_simple_one() -> None:
    weights = loss_weights("min-snr", "eps", make_schedule("cosine", T=T), torch.arange(T), gamma=1e12)
    assert weights is not None
    assert weights.unique().tolist() == [1.0]


def test_unknown_names_are_a_programming_error() -> None:
    schedule, t = make_schedule("linear", T=T), torch.arange(T)
    with pytest.raises(AssertionError, match="snr"):
        loss_weights("snr", "eps", schedule, t)
    with pytest.raises(AssertionError, match="epsilon"):
        loss_weights("min-snr", "epsilon", schedule, t)
