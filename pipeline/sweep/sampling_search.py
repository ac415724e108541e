"""What needs no training: one trained model sampled in several ways, each result with its own protocol."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import EvaluateConfig, SamplingConfig, TrainConfig, TuneConfig, override
from pipeline.errors import UserError
from pipeline.evaluation.actors import open_workers
from pipeline.evaluation.evaluator import evaluate_last, num_chunks
from pipeline.generation import check_sampling
from pipeline.sweep.dimension import Choice, knob_types, parse_search
from pipeline.sweep.record import SampledAs
from pipeline.tracking import Tracker

__all__ = ["sample_otherwise", "ways_to_sample"]

# The options that one sampler alone has: for the others every value is the same way to sample.
_ONLY_OF = {"eta": "ddim", "variance": "ddpm"}


def ways_to_sample(config: TuneConfig) -> list[dict[str, Any]]:
    """Every combination of ``--sampling-search``, as sampling knobs; options that a sampler lacks are left out.

    Raises:
        UserError: No sampling knob, or no list of values.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for text in config.sampling_search:
        name, dimension = parse_search("--sampling-search", text, knob_types(SamplingConfig))
        if not isinstance(dimension, Choice):
            raise UserError(f"--sampling-search {text!r}: every value is tried; give choice(...)")
        axes[name] = dimension.values
    found: list[dict[str, Any]] = []
    for values in itertools.product(*axes.values()):
        way = dict(zip(axes, values, strict=True))
        sampler = way.get("sampler", config.base.sampling.sampler)
        way = {name: value for name, value in way.items() if _ONLY_OF.get(name, sampler) == sampler}
        override(config.base.sampling, way)
        if way and way not in found:
            found.append(way)
    return found


def sample_otherwise(
    evaluation: EvaluateConfig, ways: Sequence[Mapping[str, Any]], trained: TrainConfig, tracker: Tracker
) -> list[SampledAs]:
    """The objective of a run's last checkpoint in each way that its T allows.

    Args:
        evaluation: The sweep's protocol.
        ways: What to change of it.
        trained: The run's config.
        tracker: Connected to MLflow.

    Raises:
        WorldError: The checkpoint cannot be measured.
    """
    assert trained.name is not None
    found = []
    wanted = [(way, override(evaluation.sampling, dict(way))) for way in ways]
    wanted = [(way, sampling) for way, sampling in wanted if _is_possible(sampling, trained)]
    if not wanted:
        return []
    with open_workers(evaluation.cluster, evaluation.protocol, most=num_chunks(evaluation)) as workers:
        for way, sampling in wanted:
            result = evaluate_last(
                replace(evaluation, sampling=sampling),
                trained.name,
                tracker,
                logged_under=f"/sampling/{_words(way)}",
                workers=workers,
            )
            found.append(SampledAs(knobs=way, value=result.value, identity=result.identity))
    return found


def _is_possible(sampling: SamplingConfig, trained: TrainConfig) -> bool:
    try:
        check_sampling(sampling, trained)
    except UserError:
        return False
    return True


def _words(way: Mapping[str, Any]) -> str:
    """For the name of a metric, where MLflow takes few characters."""
    return re.sub(r"[^A-Za-z0-9_. -]+", "p", " ".join(f"{name} {value}" for name, value in way.items()))
