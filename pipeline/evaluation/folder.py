"""A model folder is measured against a data set, without MLflow: nothing is published, the result is printed."""

import contextlib
import tempfile
import time
from pathlib import Path

from pipeline import cluster, storage
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.actors import ModelFiles, open_workers
from pipeline.evaluation.evaluator import Deadline, num_chunks
from pipeline.evaluation.features import extractor_of
from pipeline.evaluation.measure import measure
from pipeline.evaluation.outcome import Evaluation, Outcome, Skipped
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.selection import images_location, protocols_of
from pipeline.evaluation.subject import Model, OutOfTimeError, reference_of
from pipeline.generation import check_sampling
from pipeline.model_folder import (
    EMA_FILE,
    META_FILE,
    MODEL_FILE,
    load_tensors,
    read_meta,
    shown_as,
    write_meta,
    write_tensors,
)

__all__ = ["evaluate_folder"]


def evaluate_folder(config: EvaluateConfig) -> Outcome:
    """Measures ``config.checkpoint`` against ``config.reference``; starts Ray if no cluster is given.

    Raises:
        UserError: No model folder or data set, or they do not fit each other.
        WorldError: Damaged files, or storage does not answer.
    """
    assert config.checkpoint is not None
    assert config.reference is not None
    started, deadline = time.monotonic(), Deadline.of(config)
    checkpoint = storage.resolve(config.checkpoint)
    files = _read(checkpoint, config.weights)
    meta = files.read_meta(checkpoint)
    if (found_hash := storage.sha256_hex(files.weights)) != (expected := meta.files.get(EMA_FILE)):
        raise WorldError(f"{checkpoint}/{EMA_FILE} is damaged: sha256 {found_hash}, expected {expected}")
    check_sampling(config.sampling, meta.config)
    suffix = "" if config.weights == "ema" else f"-{config.weights}"
    name = f"{meta.config.name or checkpoint.rpartition('/')[2]}-step-{meta.step:08d}{suffix}"
    model = Model(name=config.checkpoint, files=files, meta=meta, images=images_location(config, name))
    location = storage.resolve(config.reference, "data")
    manifest = reference_of(location, model)
    extractor = extractor_of(config.protocol)
    distance = Protocol.of(config, extractor, manifest.digest, config.weights, suffix)
    protocols = protocols_of(config, distance, extractor)

    def after_chunk() -> None:
        if deadline.is_over:
            raise OutOfTimeError

    workers_of = config.cluster
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.connect(num_cpus=workers_of.max_workers * workers_of.cpus_per_worker))
        workers = stack.enter_context(open_workers(workers_of, config.protocol, most=num_chunks(config)))
        try:
            found = measure(
                config,
                model,
                manifest,
                location,
                protocol=distance,
                metrics=protocols,
                extractor=extractor,
                workers=workers,
                after_chunk=after_chunk,
            )
        except OutOfTimeError:
            reason = "--max-minutes are over; the same command goes on with what is missing"
            return Outcome(skipped=[Skipped(run=config.checkpoint, step=meta.step, reason=reason)])
    found.discard()
    protocol = next(iter(protocols.values()))
    values = {name: value for group in found.metrics.values() for name, value in group.items()}
    evaluation = Evaluation(
        run=meta.config.name or config.checkpoint,
        step=meta.step,
        model_id=files.model_id,
        weights=protocol.weights,
        metric=protocol.metric,
        value=values[protocol.metric],
        metrics=values,
        num_images=config.protocol.num_images,
        identity=protocol.identity,
        seconds=time.monotonic() - started,
        images=model.images,
        note=found.note,
    )
    return Outcome(evaluated=[evaluation])


def _read(location: str, which: str) -> ModelFiles:
    file, who = (EMA_FILE, "publishes and keeps") if which == "ema" else (MODEL_FILE, "keeps in runs/NAME")
    try:
        weights, meta = (storage.read_bytes(storage.join(location, name)) for name in (file, META_FILE))
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = f"a folder with {file} and {META_FILE}, as training {who} them"
        raise UserError(f"--checkpoint {location} is no model: give {wanted}") from error
    files = ModelFiles(storage.sha256_hex(weights), weights, meta)
    return files if which == "ema" else _as_published(files, location)


def _as_published(files: ModelFiles, location: str) -> ModelFiles:
    """Raw weights in the place of the average, so that they are sampled like it."""
    with (
        tempfile.TemporaryDirectory(prefix="ddpm-raw-") as name,
        tempfile.TemporaryDirectory(prefix="ddpm-raw-") as made,
    ):
        folder, published = Path(name), Path(made)
        (folder / MODEL_FILE).write_bytes(files.weights)
        (folder / META_FILE).write_bytes(files.meta)
        with shown_as(folder, location):
            meta = read_meta(folder)
            write_tensors(published, EMA_FILE, load_tensors(folder, MODEL_FILE, meta))
        write_meta(published, step=meta.step, config=meta.config, data=meta.data, code=meta.code)
        return ModelFiles.read(files.model_id, published)
