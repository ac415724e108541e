"""The show job: what is wanted, drawn, written, and logged."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pipeline import storage
from pipeline.config import ShowConfig, TuneConfig
from pipeline.diffusion.noise_schedule import NoiseSchedule, make_schedule
from pipeline.errors import UserError
from pipeline.show.page import Picture, render
from pipeline.show.pictures import ModelPictures, forward, schedule_curves
from pipeline.show.subject import DataSet, Model, find_checkpoint, load_data, load_model
from pipeline.tracking import Tracker

__all__ = ["Shown", "show"]

_OF_A_MODEL = ("trajectory", "progressive", "sharing", "interpolation", "neighbours")
_OF_IMAGES = {"forward", "interpolation", "neighbours"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What was drawn."""

    page: str
    """Location of the HTML page."""
    pictures: tuple[str, ...]
    """Locations of the PNG files."""
    logged: tuple[str, ...] = ()
    """How to see them in MLflow."""

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        return "\n".join([f"{len(self.pictures)} pictures; all of them on {self.page}", *self.logged])


def show(config: ShowConfig) -> Shown:
    """Draws what ``config`` asks for.

    Raises:
        UserError: No such run, model or data set; they do not fit each other; a picture that needs what is not given.
        WorldError: Damaged files, or storage or MLflow does not answer.
    """
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use-gpu: this machine has no GPU; leave it out")
    tracker = Tracker() if config.run is not None else None
    checkpoint = find_checkpoint(config, tracker) if tracker is not None else None
    model = load_model(config, tracker, checkpoint)
    pictures = list(_draw(config, model))
    title = model.name if model is not None else "Noise schedules"
    page = render(title, _facts(config, model), pictures)
    folder = storage.resolve(config.out or (model.name if model is not None else "schedules"), "show")
    files = {f"{picture.name}.png": picture.png for picture in pictures} | {"index.html": page.encode()}
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    logged: tuple[str, ...] = ()
    if config.log:
        assert tracker is not None
        assert checkpoint is not None
        with tempfile.TemporaryDirectory(prefix="ddpm-show-") as copy:
            for name, data in files.items():
                (Path(copy) / name).write_bytes(data)
            logged = tuple(tracker.log_files(checkpoint, Path(copy), f"show/step-{checkpoint.step:08d}"))
    return Shown(
        page=storage.join(folder, "index.html"),
        pictures=tuple(storage.join(folder, f"{picture.name}.png") for picture in pictures),
        logged=logged,
    )


def _draw(config: ShowConfig, model: Model | None) -> Iterator[Picture]:
    wanted = [name for name in config.pictures if model is not None or name not in _OF_A_MODEL]
    if not wanted:
        raise UserError(f"--pictures {' '.join(config.pictures)}: these need a model; give --run or --checkpoint")
    schedules = _schedules(config, model)
    if "schedules" in wanted:
        yield schedule_curves(schedules)
    data = load_data(config, model) if set(wanted) & _OF_IMAGES else None
    seed = config.sampling.sample_seed
    images = data.images(max(2, config.num_images), seed) if data else torch.empty(0)
    if "forward" in wanted:
        yield forward(images[: config.num_images], {name: each.to("cpu") for name, each in schedules.items()}, seed)
    if model is None or not set(wanted) & set(_OF_A_MODEL):
        return
    of_model = ModelPictures(model, config.sampling, config.num_images)
    drawn: dict[str, Callable[[], Picture]] = {
        "trajectory": of_model.trajectory,
        "progressive": of_model.progressive,
        "sharing": of_model.sharing,
        "interpolation": lambda: of_model.interpolation(images[:2]),
        "neighbours": lambda: of_model.neighbours(cast(DataSet, data)),
    }
    for name, draw in drawn.items():
        if name in wanted:
            yield draw()


def _schedules(config: ShowConfig, model: Model | None) -> dict[str, NoiseSchedule]:
    """The model's own schedule first, then each combination of the flags."""
    found: dict[str, NoiseSchedule] = {}
    if model is not None:
        own = model.meta.config.diffusion
        found[f"model: {own.schedule}, T={own.T}"] = model.schedule
    for schedule in config.schedules:
        for text in config.beta_ranges if schedule != "cosine" else config.beta_ranges[:1]:
            start, end = TuneConfig.parse_beta_range(text)
            for T in config.Ts:
                words = [schedule, *([text] if len(config.beta_ranges) > 1 and schedule != "cosine" else [])]
                name = ", ".join([*words, f"T={T}"])
                # Drawing is no training: a schedule that leaves signal in x_T is worth a look.
                made = make_schedule(schedule, T=T, beta_start=start, beta_end=end, allow_signal_at_T=True)
                if not any(made.T == each.T and made.betas.equal(each.betas.cpu()) for each in found.values()):
                    found[name] = made
    return found


def _facts(config: ShowConfig, model: Model | None) -> dict[str, str]:
    facts = {"seed": str(config.sampling.sample_seed)}
    if model is None:
        return facts
    trained, sampling = model.meta.config, config.sampling
    classes = f", guidance {sampling.guidance:g}" if trained.model.num_classes else ""
    back = "ddpm" if sampling.sampler == "ddpm" else "ddim"
    return {
        "model": f"{trained.name or model.name.rpartition('-step-')[0]}, step {model.meta.step:,}, EMA weights",
        "trained on": str(model.meta.data["location"]),
        "predicts": trained.model.prediction,
        "trajectory, progressive, neighbours": f"{sampling.sampler}, {sampling.sampling_steps} steps{classes}",
        "interpolation": f"{back}, {sampling.sampling_steps} steps{classes}",
        "sharing": f"ddpm, {sampling.variance}, {sampling.sampling_steps} steps{classes}",
    } | facts
