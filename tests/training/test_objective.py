"""The loss of an image: what is predicted, how it counts, and which labels the network is told."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig, override
from pipeline.data.batches import Batch
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import q_sample, simple_loss
from pipeline.model_folder import build_schedule, build_unet
from pipeline.training.objective import hidden_labels, image_losses

SMALL = {"base_channels": 8, "image_size": 8}


def config_of(**knobs: object) -> TrainConfig:
    return override(TrainConfig(), SMALL | knobs)


def batch_of(labels: Tensor | None, *, step: int = 0, streams: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    size = 4 * len(streams)
    return Batch(step=step, x_0=torch.zeros(size, 1, 8, 8), labels=labels, keys=("",) * size, streams=streams)


def images(size: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    return x_0, torch.linspace(0, T - 1, size).long(), torch.randn(x_0.shape, generator=generator)


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Random weights of a useful size also where the initialiser leaves almost nothing."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def trained(config: TrainConfig) -> tuple[nn.Module, NoiseSchedule]:
    return shake(build_unet(config.model)), build_schedule(config.diffusion)


def test_the_loss_of_the_defaults_is_that_of_the_paper_bit_for_bit_and_so_are_its_gradients() -> None:
    config = config_of()
    (model, schedule), (x_0, t, eps) = trained(config), images(12, 1000)
    plain = simple_loss(eps, model(q_sample(schedule, x_0, t, eps), t))
    plain.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    losses = image_losses(model, schedule, config, x_0, t, eps, None)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert torch.equal(losses, plain)
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))


class Perfect(nn.Module):
    """Answers with the image, noise or velocity that it was built with, and an error of the x_0 it implies."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_a_network_that_is_right_has_no_loss_and_one_that_is_off_by_a_tenth_has_the_weighted_hundredth(
    prediction: str, weighting: str
) -> None:
    config = config_of(prediction=prediction, loss_weighting=weighting)
    schedule, (x_0, t, eps) = build_schedule(config.diffusion), images(50, 1000)
    alpha_bar = schedule.alphas_cumprod[t]
    v = alpha_bar.sqrt()[:, None, None, None] * eps - (1 - alpha_bar).sqrt()[:, None, None, None] * x_0
    truth = {"eps": eps, "v": v.float(), "x_0": x_0}[prediction]
    assert image_losses(Perfect(truth), schedule, config, x_0, t, eps, None).max() < 1e-12
    losses = image_losses(Perfect(truth + 0.1), schedule, config, x_0, t, eps, None)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / {"eps": snr, "v": snr + 1, "x_0": torch.ones_like(snr)}[prediction]
    expected = 0.01 * (weight if weighting == "min-snr" else torch.ones_like(snr))
    torch.testing.assert_close(losses, expected.float(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_the_loss_is_float32_and_its_coefficients_exact_where_the_network_computes_in_half_precision(
    prediction: str,
) -> None:
    config = config_of(prediction=prediction, loss_weighting="min-snr")
    (model, schedule), (x_0, t, eps) = trained(config), images(12, 1000)
    full = image_losses(model, schedule, config, x_0, t, eps, None)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = image_losses(model, schedule, config, x_0, t, eps, None)
    assert half.dtype == torch.float32
    assert torch.equal(seen[0], q_sample(schedule, x_0, t, eps))
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)


def test_an_unconditional_model_is_told_nothing() -> None:
    assert hidden_labels(config_of(), batch_of(torch.arange(16) % 10)) is None
    assert hidden_labels(config_of(), batch_of(None)) is None


def test_labels_are_hidden_as_often_as_asked_and_the_others_stay_as_they_are() -> None:
    config = config_of(num_classes=10, label_dropout=0.25)
    labels = torch.arange(16) % 10
    told = [hidden_labels(config, batch_of(labels, step=step)) for step in range(1000)]
    assert all(each is not None and each.dtype == torch.int64 and each.device.type == "cpu" for each in told)
    hidden = torch.stack(told) == 10
    assert 0.24 < hidden.double().mean() < 0.26
    assert torch.equal(torch.stack(told)[~hidden], labels.repeat(1000, 1)[~hidden])
    assert labels.tolist() == [*range(10), *range(6)]


@pytest.mark.parametrize(("part", "hidden"), [(0.0, 0), (1.0, 16)])
def test_no_label_or_every_label_can_be_hidden(part: float, hidden: int) -> None:
    config = config_of(num_classes=10, label_dropout=part)
    told = hidden_labels(config, batch_of(torch.zeros(16, dtype=torch.int64)))
    assert int((told == 10).sum()) == hidden


def test_which_labels_are_hidden_depends_on_seed_step_and_stream_alone() -> None:
    config = config_of(num_classes=10, label_dropout=0.5)
    zeros = torch.zeros(16, dtype=torch.int64)
    whole = hidden_labels(config, batch_of(zeros, step=3))
    parts = [hidden_labels(config, batch_of(zeros[:8], step=3, streams=streams)) for streams in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, hidden_labels(config, batch_of(zeros, step=4)))
    assert not torch.equal(whole, hidden_labels(override(config, {"seed": 1}), batch_of(zeros, step=3)))


def test_the_network_is_told_the_labels() -> None:
    config = config_of(num_classes=10)
    (model, schedule), (x_0, t, eps) = trained(config), images(12, 1000)
    told, others = torch.zeros(12, dtype=torch.int64), torch.full((12,), 10)
    losses = image_losses(model, schedule, config, x_0, t, eps, told)
    assert torch.equal(losses, simple_loss(eps, model(q_sample(schedule, x_0, t, eps), t, told)))
    assert not torch.equal(losses, image_losses(model, schedule, config, x_0, t, eps, others))
