"""Images from a network and a seed: of the right classes, and of whatever the network predicts."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import SamplingConfig, TrainConfig, override
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.errors import UserError, WorldError
from pipeline.generation import check_sampling, generate_chunk, labels_of_chunk
from pipeline.images import to_uint8
from pipeline.model_folder import build_schedule

SHAPE = (20, 1, 4, 4)


class Painter(nn.Module):
    """Knows one grey for each class and tells it as eps, v or x_0; "no class" is black."""

    def __init__(self, schedule: NoiseSchedule, prediction: str, greys: Tensor) -> None:
        super().__init__()
        self.schedule, self.prediction, self.greys = schedule, prediction, greys

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod[t][:, None, None, None]
        x_0 = (self.greys[-1] if labels is None else self.greys[labels][:, None, None, None]).double()
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        return {"eps": eps, "v": v, "x_0": x_0 + 0 * x_t}[self.prediction].float()


GREYS = torch.tensor([-0.5, 0.0, 0.5, -1.0])


def painted(chunk: int = 0, *, sampler: str = "ddim", **knobs: object) -> tuple[Tensor, Tensor]:
    """Greys of a chunk's images, and the labels that they should have."""
    trained = override(TrainConfig(), {"num_classes": 3, "T": 100, "sampling_steps": 10, "sampler": sampler} | knobs)
    schedule = build_schedule(trained.diffusion)
    painter = Painter(schedule, trained.model.prediction, GREYS)
    images = generate_chunk(painter, schedule, trained.sampling, trained=trained, shape=SHAPE, chunk=chunk)
    assert (images.shape, images.dtype) == (SHAPE, torch.uint8)
    assert int((images - images[:, :, :1, :1]).abs().max()) == 0
    return images[:, 0, 0, 0], labels_of_chunk(trained.sampling, 3, size=SHAPE[0], chunk=chunk)


def greys(values: Tensor) -> list[int]:
    return to_uint8(values.reshape(-1, 1, 1, 1)).flatten().tolist()


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "heun"])
def test_each_image_is_of_the_class_drawn_for_it(sampler: str, prediction: str) -> None:
    got, labels = painted(sampler=sampler, prediction=prediction)
    assert got.tolist() == greys(GREYS[labels])
    assert set(labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_guidance_zero_ignores_the_class_and_more_than_one_overshoots_it(prediction: str) -> None:
    ignored, labels = painted(prediction=prediction, guidance=0.0)
    assert ignored.tolist() == greys(GREYS[-1:].expand(20))
    overshot, _ = painted(prediction=prediction, guidance=1.25)
    assert overshot.tolist() == greys(-1 + 1.25 * (GREYS[labels] + 1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampling_steps_are_network_evaluations_whatever_the_sampler(sampler: str, steps: int) -> None:
    trained = override(TrainConfig(), {"sampler": sampler, "sampling_steps": steps})
    schedule, calls = build_schedule(trained.diffusion), []
    painter = Painter(schedule, "eps", GREYS)
    painter.register_forward_hook(lambda *_: calls.append(1))
    generate_chunk(painter, schedule, trained.sampling, trained=trained, shape=SHAPE, chunk=0)
    assert len(calls) == steps


def test_predictions_out_of_range_are_cut_scaled_or_left_as_the_knob_says() -> None:
    trained = override(TrainConfig(), {"prediction": "x_0", "sampling_steps": 1})
    schedule = build_schedule(trained.diffusion)
    ramp = torch.linspace(0, 2, 16).reshape(1, 1, 4, 4)
    found = {}
    for clipping in ("none", "clip", "dynamic"):
        sampling = override(trained.sampling, {"x0_clipping": clipping, "x0_percentile": 1.0})
        images = generate_chunk(
            lambda x_t, t: ramp + 0 * x_t, schedule, sampling, trained=trained, shape=(1, 1, 4, 4), chunk=0
        )
        found[clipping] = images.flatten().tolist()
    # The way over eps and back rounds, which may move a value across the border of a grey level.
    assert found["none"] == pytest.approx(greys(ramp.clamp(max=1)), abs=1)
    assert found["clip"] == pytest.approx(greys(ramp.clamp(max=1)), abs=1)
    assert found["dynamic"] == pytest.approx(greys(ramp / 2), abs=1)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_an_unconditional_network_is_called_without_labels(prediction: str) -> None:
    trained = override(TrainConfig(), {"prediction": prediction, "sampling_steps": 10})
    schedule = build_schedule(trained.diffusion)
    painter = Painter(schedule, prediction, torch.tensor([0.5]))
    images = generate_chunk(painter, schedule, trained.sampling, trained=trained, shape=SHAPE, chunk=0)
    assert images.unique().tolist() == greys(torch.tensor([0.5]))


def test_labels_are_a_function_of_seed_and_chunk_and_every_class_is_equally_likely() -> None:
    first = labels_of_chunk(SamplingConfig(), 10, size=100, chunk=0)
    assert first.dtype == torch.int64
    assert torch.equal(first, labels_of_chunk(SamplingConfig(guidance=4.0), 10, size=100, chunk=0))
    assert not torch.equal(first, labels_of_chunk(SamplingConfig(), 10, size=100, chunk=1))
    assert not torch.equal(first, labels_of_chunk(SamplingConfig(sample_seed=1), 10, size=100, chunk=0))
    counts = sum(
        torch.bincount(labels_of_chunk(SamplingConfig(), 10, size=100, chunk=c), minlength=10) for c in range(99)
    )
    assert all(890 < count < 1090 for count in counts.tolist())


def test_chunks_do_not_share_their_classes() -> None:
    assert painted(chunk=0)[0].tolist() != painted(chunk=1)[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "training", "message"),
    [
        ({"sampling_steps": 101}, {"T": 100}, "--sampling-steps 101: the model has T=100; give at most 100"),
        ({"guidance": 1.5}, {}, r"--guidance 1.5: the model has no classes \(--num-classes 0\); give 1"),
        ({"guidance": 0.0}, {"num_classes": 2, "label_dropout": 0.0}, "never trained without labels"),
    ],
)
def test_sampling_that_the_training_does_not_allow_is_refused_in_one_line(
    sampling: dict[str, object], training: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_sampling(override(SamplingConfig(), sampling), override(TrainConfig(), training))
    assert "\n" not in str(caught.value)


def test_guidance_one_needs_neither_classes_nor_training_without_labels() -> None:
    check_sampling(SamplingConfig(), TrainConfig())
    check_sampling(SamplingConfig(), override(TrainConfig(), {"num_classes": 2, "label_dropout": 0.0}))
    check_sampling(SamplingConfig(guidance=3.0), override(TrainConfig(), {"num_classes": 2}))


def test_weights_that_give_no_numbers_are_refused_by_chunk() -> None:
    trained = override(TrainConfig(), {"sampling_steps": 2})
    schedule = build_schedule(trained.diffusion)
    broken = Painter(schedule, "eps", torch.tensor([float("nan")]))
    with pytest.raises(WorldError, match=r"not finite \(chunk 7\)"):
        generate_chunk(broken, schedule, trained.sampling, trained=trained, shape=SHAPE, chunk=7)
