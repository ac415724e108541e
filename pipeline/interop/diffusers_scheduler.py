"""``DDPMScheduler``'s config and our schedule, prediction and reverse variance.

Other schedulers that carry the same betas (DDIM, PNDM, DPMSolver, UniPC, Euler, ...) tell the schedule as well: they
sample the same network in other ways.

Their beta_start and beta_end are the betas themselves; ours are values at T = 1000, scaled by 1000 / T.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config import ScheduleConfig, TrainConfig
from pipeline.diffusion.noise_schedule import REFERENCE_T
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
_ONLY = {"trained_betas": None, "rescale_betas_zero_snr": False, "clip_sample_range": 1.0}
_BETA_FIELDS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
# Their dynamic thresholding cuts its scale off at sample_max_value; ours has no such limit. Their default of 1 leaves
# no scale at all, which is clipping.
_NO_LIMIT = 1e9
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")
_MOST_STEPS = 10**6


def our_schedule(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """What a scheduler config says in our words.

    Args:
        config: The content of ``scheduler_config.json``.
        where: What messages call it.

    Returns:
        Knobs of schedule, prediction and sampling; what it does not say is left out.

    Raises:
        UserError: A field has a value that nothing here corresponds to; it is named.
    """
    try:
        _check_class(config)
        for field, allowed in _ONLY.items():
            if (found := config.get(field, allowed)) != allowed:
                raise UserError(f"{field} is {str(found)[:40]}; allowed is {allowed}")
        return {
            **_betas(config),
            "prediction": _known(config, "prediction_type", "epsilon", _PREDICTIONS),
            **_variance(config),
            **_clipping(config),
        }
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever JSON can hold in the place of numbers and words
        raise UserError(f"{where} is no config of a scheduler: {error!r}") from error


def _check_class(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "DDPMScheduler")
    missing = [field for field in _BETA_FIELDS if field not in config]
    if name != "DDPMScheduler" and missing:
        raise UserError(f"_class_name is {name!r}, without {missing[0]}; give a DDPMScheduler or one with its betas")


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    T = config.get("num_train_timesteps", REFERENCE_T)
    if not isinstance(T, int) or not 1 <= T <= _MOST_STEPS:
        raise UserError(f"num_train_timesteps is {str(T)[:40]}; allowed are whole numbers in 1..{_MOST_STEPS}")
    found = {"schedule": _known(config, "beta_schedule", "linear", _SCHEDULES), "T": T}
    if found["schedule"] == "cosine":
        return found
    ends = {name: _number(config, name, default) for name, default in (("beta_start", 1e-4), ("beta_end", 0.02))}
    return found | {name: _rounded(beta * T / REFERENCE_T) for name, beta in ends.items()}


def _variance(config: Mapping[str, Any]) -> dict[str, str]:
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler" and config.get("variance_type") not in _VARIANCES:
        return {}
    return {"variance": _known(config, "variance_type", "fixed_small", _VARIANCES)}


def _clipping(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("thresholding", False):
        limit = config.get("sample_max_value", 1.0)
        if limit != 1.0 and not limit >= _NO_LIMIT:
            raise UserError(f"sample_max_value is {limit}; allowed are 1.0 (clipping) and from {_NO_LIMIT:g} on")
        percentile = _number(config, "dynamic_thresholding_ratio", 0.995)
        return {"x0_clipping": "clip"} if limit == 1.0 else {"x0_clipping": "dynamic", "x0_percentile": percentile}
    if "clip_sample" not in config and config.get("_class_name", "DDPMScheduler") not in _CLIPPING:
        return {}
    return {"x0_clipping": "clip" if config.get("clip_sample", True) else "none"}


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


def _known(config: Mapping[str, Any], field: str, default: str, known: Mapping[str, str]) -> str:
    found = config.get(field, default)
    if not isinstance(found, str) or found not in known:
        raise UserError(f"{field} is {found!r}; allowed are {', '.join(known)}")
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
