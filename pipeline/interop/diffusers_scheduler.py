"""``DDPMScheduler``'s config and our schedule, prediction and reverse variance.

Their beta_start and beta_end are the betas themselves; ours are values at T = 1000, scaled by 1000 / T.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.config import SamplingConfig, ScheduleConfig, TrainConfig
from pipeline.diffusion.noise_schedule import MAX_SIGNAL_AT_T, REFERENCE_T
from pipeline.errors import UserError
from pipeline.model_folder import build_schedule

__all__ = ["our_schedule", "their_scheduler"]

_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
_VARIANCES = {
    "fixed_small": "fixed-small",
    "fixed_small_log": "fixed-small",
    "fixed_large": "fixed-large",
    "fixed_large_log": "fixed-large",
}
_CLASSES = ("DDPMScheduler", "DDIMScheduler")
# Their dynamic thresholding cuts its scale off at this value; ours has no such limit.
_NO_LIMIT = 1e9
_MOST_STEPS = 10**6


def our_schedule(config: Mapping[str, Any], *, where: str) -> tuple[ScheduleConfig, str, SamplingConfig]:
    """What a scheduler config says in our words.

    Args:
        config: The content of ``scheduler_config.json``.
        where: What messages call it.

    Returns:
        The noise schedule, what the network predicts, and how reverse variance and x_0 are treated.

    Raises:
        UserError: A field has a value that nothing here corresponds to; it is named.
    """
    try:
        return _our_schedule(config, where)
    except UserError as error:
        raise error if where in str(error) else UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever JSON can hold in the place of numbers and words
        raise UserError(f"{where} is no config of a scheduler: {error!r}") from error


def _our_schedule(config: Mapping[str, Any], where: str) -> tuple[ScheduleConfig, str, SamplingConfig]:
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _CLASSES:
        raise UserError(f"{where}: _class_name is {name}; give the config of a {' or '.join(_CLASSES)}")
    for field, allowed in {"trained_betas": None, "rescale_betas_zero_snr": False, "clip_sample_range": 1.0}.items():
        if (found := config.get(field, allowed)) != allowed:
            raise UserError(f"{where}: {field} is {str(found)[:40]}; allowed is {allowed}")
    T = config.get("num_train_timesteps", REFERENCE_T)
    if not isinstance(T, int) or not 1 <= T <= _MOST_STEPS:
        raise UserError(f"num_train_timesteps is {str(T)[:40]}; allowed are whole numbers in 1..{_MOST_STEPS}")
    start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
    shape: Any = _known(config, "beta_schedule", "linear", _SCHEDULES, where)
    schedule = ScheduleConfig(schedule=shape, T=T)
    if shape != "cosine":
        schedule = replace(
            schedule, beta_start=_rounded(start * T / REFERENCE_T), beta_end=_rounded(end * T / REFERENCE_T)
        )
    # It was trained like this, whatever one may think of it.
    if build_schedule(replace(schedule, allow_signal_at_T=True)).signal_at_T > MAX_SIGNAL_AT_T:
        schedule = replace(schedule, allow_signal_at_T=True)
    prediction = _known(config, "prediction_type", "epsilon", _PREDICTIONS, where)
    variance: Any = _known(config, "variance_type", "fixed_small", _VARIANCES, where)
    clipping: Any = "clip" if config.get("clip_sample", True) else "none"
    percentile = SamplingConfig().x0_percentile
    if config.get("thresholding", False):
        clipping, percentile = "dynamic", _number(config, "dynamic_thresholding_ratio", 0.995)
    return schedule, prediction, SamplingConfig(variance=variance, x0_clipping=clipping, x0_percentile=percentile)


def their_scheduler(config: TrainConfig) -> dict[str, Any]:
    """The ``DDPMScheduler`` config of a model: its schedule, and its reverse variance and x_0 clipping."""
    schedule, sampling = config.diffusion, config.sampling
    scale = REFERENCE_T / schedule.T
    fields: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.T,
        "beta_schedule": _inverse(_SCHEDULES, schedule.schedule),
        "beta_start": schedule.beta_start * scale,
        "beta_end": schedule.beta_end * scale,
        "trained_betas": None,
        "variance_type": _inverse(_VARIANCES, sampling.variance),
        "prediction_type": _inverse(_PREDICTIONS, config.model.prediction),
        "clip_sample": sampling.x0_clipping == "clip",
        "clip_sample_range": 1.0,
        "thresholding": sampling.x0_clipping == "dynamic",
        "dynamic_thresholding_ratio": sampling.x0_percentile,
        "sample_max_value": _NO_LIMIT if sampling.x0_clipping == "dynamic" else 1.0,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    usual = ScheduleConfig()
    if schedule.schedule == "cosine":
        if (schedule.cosine_s, schedule.max_beta) != (usual.cosine_s, usual.max_beta):
            fields["trained_betas"] = build_schedule(schedule).betas.tolist()  # they have no names for these
        del fields["beta_start"], fields["beta_end"]
    return fields


def _known(config: Mapping[str, Any], field: str, default: str, known: Mapping[str, str], where: str) -> str:
    found = config.get(field, default)
    if not isinstance(found, str) or found not in known:
        raise UserError(f"{where}: {field} is {found!r}; allowed are {', '.join(known)}")
    return known[found]


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    found = config.get(field, default)
    if not isinstance(found, int | float) or not 0 < found <= 1:
        raise UserError(f"{field} is {str(found)[:40]}; allowed is a number above 0 and at most 1")
    return float(found)


def _inverse(words: Mapping[str, str], ours: str) -> str:
    return next(theirs for theirs, word in words.items() if word == ours)


def _rounded(beta: float) -> float:
    """To 12 digits: a beta that was scaled by 1000 / T is itself again after scaling back."""
    return float(f"{beta:.12g}")
