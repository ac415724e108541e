"""Bits per dimension of one model on held-out images, gathered chunk by chunk like generated ones."""

from collections.abc import Callable

from pipeline import storage
from pipeline.config import EvaluateConfig
from pipeline.evaluation.actors import Workers
from pipeline.evaluation.bound import BoundPlan, Likelihood
from pipeline.evaluation.eta import Progress
from pipeline.evaluation.gathering import Chunk, Gathering, Moments
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.subject import Model, OutOfTimeError, reference_of

__all__ = ["measure_bound"]


def measure_bound(
    config: EvaluateConfig, model: Model, protocol: Protocol, workers: Workers, after_chunk: Callable[[], None]
) -> tuple[Likelihood, Gathering]:
    """Makes the chunks that an earlier evaluation has not left.

    Args:
        config: The held-out data set, number of images and stride.
        model: What is measured.
        protocol: That of ``bpd``.
        workers: The actors.
        after_chunk: Called after each chunk; what it raises ends the work.

    Returns:
        The bound, and what is to be discarded once it is safe.

    Raises:
        UserError: The data set is of another shape, or has no classes for a model that knows some.
        WorldError: Images or weights are damaged, or storage does not answer.
        OutOfTimeError: As ``after_chunk`` raised it; what was made is kept.
    """
    manifest = reference_of(storage.resolve(config.held_out or "", "data"), model, digest=None)
    plan, T = BoundPlan.of(config, manifest), model.meta.config.diffusion.T
    key = {
        "model": model.files.model_id,
        "weights": storage.sha256_hex(model.files.weights),
        "meta": storage.sha256_hex(model.files.meta),
        "protocol": protocol.identity,
    }
    gathering = Gathering(key, lambda: {"moments": Moments(plan.num_columns(T))})
    numbers = range(gathering.next_chunk, plan.num_chunks)
    before = gathering.accumulators["moments"]
    assert isinstance(before, Moments)
    progress = Progress(f"bits/dim of {model.name}", plan.num_images, done=before.statistics.n)
    try:
        terms = workers.bounds(model.files, config.sampling, plan, manifest, numbers)
        for number, rows in zip(numbers, terms, strict=True):
            gathering.add(Chunk(number=number, features=rows, images=None))
            progress.add(len(rows))
            after_chunk()
    except OutOfTimeError:
        gathering.keep()
        raise
    moments = gathering.accumulators["moments"]
    assert isinstance(moments, Moments)
    return Likelihood(statistics=moments.statistics, T=T, stride=plan.stride), gathering
