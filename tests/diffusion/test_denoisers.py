from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.denoisers import eps_denoiser, guided
from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.diffusion.process import PREDICTIONS
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.diffusion.timesteps import sampling_timesteps

T = 100


def knowing(schedule: NoiseSchedule, x_0: Tensor | float, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that knows the image and tells it as x_0, as the noise, or as the velocity."""

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[t][:, None, None, None]
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        told = {"eps": eps, "v": v, "x_0": torch.zeros_like(x_t) + x_0}[prediction]
        return told.to(x_t.dtype)

    return network


def noise_of(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[int], Tensor]:
    table = torch.randn(T + 1, *shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return lambda i: table[i]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 7, T])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", [("ddpm", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 1.0, "limit_x_0": None})])
def test_every_sampler_reaches_the_image_that_the_network_knows_whatever_it_predicts(
    prediction: str, num_steps: int, name: str, sampler: tuple[str, dict[str, object]]
) -> None:
    schedule, noise_at = make_schedule(name, T=T), noise_of((2, 1, 4, 4), torch.float64)
    x_0 = torch.linspace(-0.9, 0.9, 32, dtype=torch.float64).reshape(2, 1, 4, 4)
    got = SAMPLERS[sampler[0]](
        eps_denoiser(knowing(schedule, x_0, prediction), schedule, prediction),
        schedule,
        noise_at(T),
        timesteps=sampling_timesteps(T, num_steps),
        noise_at=noise_at,
        **sampler[1],
    )
    torch.testing.assert_close(got, x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_in_float32_the_way_over_eps_costs_less_than_a_grey_level_where_least_signal_is_left(prediction: str) -> None:
    """One step from x_T of the cosine schedule divides by sqrt(alpha_bar_T) = 5e-5: the worst that can be asked for."""
    schedule = make_schedule("cosine", T=1000)
    x_T = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    x_0 = torch.linspace(-0.9, 0.9, x_T.numel()).reshape(x_T.shape)
    got = SAMPLERS["ddim"](
        eps_denoiser(knowing(schedule, x_0.double(), prediction), schedule, prediction),
        schedule,
        x_T,
        timesteps=[999],
        noise_at=lambda i: x_T,
        limit_x_0=None,
    )
    assert float((got - x_0).abs().max()) < 2 / 255


def test_a_network_that_predicts_eps_is_its_own_denoiser() -> None:
    network = knowing(make_schedule("linear", T=T), 0.0, "eps")
    assert eps_denoiser(network, make_schedule("linear", T=T), "eps") is network


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_predictions_in_half_precision_become_eps_in_the_precision_of_the_images(prediction: str) -> None:
    schedule, x_t, t = make_schedule("linear", T=T), torch.randn(2, 1, 4, 4), torch.tensor([0, T - 1])
    denoise = eps_denoiser(lambda x, t: torch.zeros_like(x, dtype=torch.bfloat16), schedule, prediction)
    alpha_bar = schedule.alphas_cumprod[t][:, None, None, None]
    factor = (1 - alpha_bar).sqrt() if prediction == "v" else 1 / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(denoise(x_t, t), (factor * x_t).float(), rtol=1e-6, atol=0)


class Labelled:
    """Predicts something different for each x_t, t and label, and counts its calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.sizes.append(len(x_t))
        return torch.sin(3 * x_t + 0.1 * t[:, None, None, None]) + 0.2 * labels[:, None, None, None]


X_T, STEPS, LABELS = torch.linspace(-1, 1, 48).reshape(3, 1, 4, 4), torch.tensor([0, 5, 9]), torch.tensor([2, 0, 1])


def test_guidance_one_is_the_conditional_network_itself_in_one_call() -> None:
    network = Labelled()
    predicted = guided(network, LABELS, num_classes=4)(X_T, STEPS)
    assert network.sizes == [3]
    assert torch.equal(predicted, network(X_T, STEPS, LABELS))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_moves_from_the_unconditional_prediction_to_the_conditional_one_and_beyond(guidance: float) -> None:
    network = Labelled()
    predicted = guided(network, LABELS, num_classes=4, guidance=guidance)(X_T, STEPS)
    assert network.sizes == [6]
    conditional = network(X_T, STEPS, LABELS)
    unconditional = network(X_T, STEPS, torch.full_like(LABELS, 4))
    torch.testing.assert_close(predicted, unconditional + guidance * (conditional - unconditional), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_a_prediction_is_guiding_the_noise_that_it_implies(prediction: str) -> None:
    """Class c means the image c / 4; "no class" is class 4 to the network. eps is affine in the image, and so in w."""
    schedule, x_t, t = make_schedule("linear", T=T), X_T.double(), torch.tensor([3, 50, 99])

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return knowing(schedule, labels.double()[:, None, None, None] / 4, prediction)(x_t, t)

    got = eps_denoiser(guided(network, LABELS, num_classes=4, guidance=2.5), schedule, prediction)(x_t, t)
    eps = {c: knowing(schedule, c, "eps")(x_t, t) for c in (1.0, 0.0, 0.25, 0.5)}
    conditional = torch.stack([eps[c / 4][i] for i, c in enumerate(LABELS.tolist())])
    torch.testing.assert_close(got, eps[1.0] + 2.5 * (conditional - eps[1.0]), rtol=1e-9, atol=1e-9)
