"""What a model of others does not say of itself: noise schedule, prediction and sampling, completed and told apart."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import RecipeConfig, ScheduleConfig, TrainConfig, override, to_flat
from pipeline.diffusion.noise_schedule import MAX_SIGNAL_AT_T
from pipeline.errors import UserError
from pipeline.interop.foreign_files import Tensors
from pipeline.model_folder import build_schedule

__all__ = ["Imported", "complete"]

_PAPER = {"schedule": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction": "eps"}
_PAPER |= {"variance": "fixed-small", "x0_clipping": "clip"}
_CIFAR10_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model of others in our words."""

    config: TrainConfig
    """Model, schedule and sampling are its own, all other knobs are defaults."""
    tensors: Tensors
    """Weights by our names."""
    notes: tuple[str, ...] = ()
    """What was chosen or assumed in reading it, in sentences."""


def complete(told: Mapping[str, Any], given: RecipeConfig, config: TrainConfig, where: str) -> Imported:
    """Puts schedule, prediction and sampling into a config.

    Args:
        told: Knobs that the source itself says.
        given: Those that flags say.
        config: Has the model; other knobs are defaults.
        where: What messages call the source.

    Returns:
        The config without weights yet, and a note of what neither says and was taken from the paper.

    Raises:
        UserError: A flag says otherwise than the source, or the numbers make no schedule.
    """
    flags = {knob: value for knob, value in to_flat(given).items() if value is not None}
    for knob, value in flags.items():
        if told.get(knob, value) != value:
            raise UserError(f"{_flag(knob, value)}: {where} says {told[knob]}; leave the flag out")
    paper = dict(_PAPER)
    if config.model.image_size == _CIFAR10_SIZE:
        paper["variance"] = "fixed-large"
    knobs = paper | flags | dict(told)
    without = ("beta_start", "beta_end") if knobs["schedule"] == "cosine" else ()
    assumed = [_flag(knob, value) for knob, value in paper.items() if knob not in {*flags, *told, *without}]
    if without:
        knobs = {knob: value for knob, value in knobs.items() if knob not in without}
    made = override(config, knobs)
    notes = (f"assumed, as the paper has it and the source does not say: {' '.join(assumed)}",) if assumed else ()
    return Imported(config=replace(made, diffusion=_as_trained(made.diffusion, where)), tensors={}, notes=notes)


def _as_trained(schedule: ScheduleConfig, where: str) -> ScheduleConfig:
    """It was trained like this, whatever one may think of the signal that is left at T."""
    allowed = replace(schedule, allow_signal_at_T=True)
    try:
        return allowed if build_schedule(allowed).signal_at_T > MAX_SIGNAL_AT_T else schedule
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _flag(knob: str, value: Any) -> str:
    return f"--{knob.replace('_', '-')} {value}"
