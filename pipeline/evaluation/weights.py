"""Which weights of a checkpoint are measured: its EMA, or an average of another width put together from snapshots."""

import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.diffusion.averages import EMA, power_stem
from pipeline.diffusion.posthoc_ema import Reconstruction, Snapshot, reconstruct, weighted_sum
from pipeline.errors import UserError
from pipeline.evaluation.actors import ModelFiles
from pipeline.model_folder import EMA_FILE, average_file, load_tensors, read_meta, write_meta, write_tensors
from pipeline.tracking import Checkpoint, Tracker

__all__ = ["Candidate", "candidates", "fetch"]

logger = logging.getLogger(__name__)

_FEWEST_SNAPSHOTS = 2
_HOW = "train with --ema-power 0.05 0.10"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint and the weights that are measured."""

    checkpoint: Checkpoint
    width: float | None = None
    """Relative width of the average to reconstruct; None: the EMA as it was published."""
    snapshots: Mapping[Snapshot, Checkpoint] = field(default_factory=dict)
    """The run's power-function averages up to the checkpoint's step, and which checkpoint holds each."""

    @property
    def name(self) -> str:
        """For folders."""
        return f"{self.checkpoint.run_name}-step-{self.checkpoint.step:08d}{self.metric_suffix}"

    @property
    def weights(self) -> str:
        """The weights in the protocol's words."""
        if self.width is None:
            return EMA
        stem, _, width = power_stem(self.width).rpartition("-")
        return f"{stem} {width} reconstructed from {len(self.snapshots)} snapshots"

    @property
    def metric_suffix(self) -> str:
        """Keeps results of other weights out of the EMA's curve."""
        return "" if self.width is None else f"-{power_stem(self.width)}"


def candidates(config: EvaluateConfig, tracker: Tracker, found: Sequence[Checkpoint]) -> list[Candidate]:
    """What can be measured of checkpoints, in their order.

    Args:
        config: Says which weights.
        tracker: Connected to MLflow.
        found: All published checkpoints of the runs that are looked at.

    Returns:
        With ``ema_width`` the checkpoints from which on there are enough snapshots.

    Raises:
        UserError: ``config.run`` has too few snapshots for ``ema_width``.
    """
    if config.ema_width is None:
        return [Candidate(checkpoint=checkpoint) for checkpoint in found]
    by_run: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in found:
        by_run[checkpoint.run_id].append(checkpoint)
    snapshots = {run_id: _snapshots(tracker, run_id, members) for run_id, members in by_run.items()}
    if config.run is not None:
        _require_snapshots(config.run, *snapshots.values())
    all_of_them = [
        Candidate(
            checkpoint=checkpoint,
            width=config.ema_width,
            snapshots={s: holder for s, holder in snapshots[checkpoint.run_id].items() if s.step <= checkpoint.step},
        )
        for checkpoint in found
    ]
    return [candidate for candidate in all_of_them if len(candidate.snapshots) >= _FEWEST_SNAPSHOTS]


def _snapshots(tracker: Tracker, run_id: str, members: Sequence[Checkpoint]) -> dict[Snapshot, Checkpoint]:
    widths = json.loads(tracker.params(run_id).get("ema_power", "[]"))
    return {Snapshot(checkpoint.step, width): checkpoint for checkpoint in members for width in widths}


def _require_snapshots(run: str, snapshots: Mapping[Snapshot, Checkpoint]) -> None:
    if not snapshots:
        raise UserError(f"run {run!r} kept no power-function averages, which --ema-width is made from; {_HOW}")
    if len(snapshots) < _FEWEST_SNAPSHOTS:
        raise UserError(
            f"run {run!r} has one snapshot of a power-function average so far and --ema-width needs "
            f"{_FEWEST_SNAPSHOTS}; wait for the next checkpoint, or {_HOW}"
        )


def fetch(candidate: Candidate, tracker: Tracker) -> tuple[ModelFiles, float | None]:
    """Downloads the weights to measure, or what they are made from, every file compared with its sha256.

    Returns:
        The model, and how far the profile of its average is from the wanted one (see ``Reconstruction``); None for the
        EMA.

    Raises:
        WorldError: A checkpoint is gone or damaged, or the store does not answer.
    """
    checkpoint = candidate.checkpoint
    with tempfile.TemporaryDirectory(prefix="ddpm-evaluate-") as name:
        published = tracker.download(checkpoint, Path(name))
        if candidate.width is None:
            return ModelFiles.read(checkpoint.model_id, published), None
        recipe = reconstruct(candidate.snapshots, Snapshot(checkpoint.step, candidate.width))
        logger.info(
            "%s step %d: width %g from %d snapshots; its profile is met to %.1g %%",
            checkpoint.run_name,
            checkpoint.step,
            candidate.width,
            len(recipe.weights),
            100 * recipe.error,
        )
        with tempfile.TemporaryDirectory(prefix="ddpm-evaluate-") as made:
            meta, folder = read_meta(published), Path(made)
            write_tensors(folder, EMA_FILE, weighted_sum(_parts(candidate, recipe, tracker, published)))
            write_meta(folder, step=meta.step, config=meta.config, data=meta.data, code=meta.code)
            return ModelFiles.read(f"{checkpoint.model_id}{candidate.metric_suffix}", folder), recipe.error


def _parts(
    candidate: Candidate, recipe: Reconstruction, tracker: Tracker, published: Path
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Weights and tensors of the snapshots; one more checkpoint on the disk and one snapshot in memory at a time."""
    by_holder: dict[str, list[Snapshot]] = defaultdict(list)
    for snapshot in recipe.weights:
        by_holder[candidate.snapshots[snapshot].model_id].append(snapshot)
    for together in by_holder.values():
        holder = candidate.snapshots[together[0]]
        with tempfile.TemporaryDirectory(prefix="ddpm-snapshot-") as name:
            is_own = holder.model_id == candidate.checkpoint.model_id
            folder = published if is_own else tracker.download(holder, Path(name))
            meta = read_meta(folder)
            for snapshot in together:
                file = average_file(power_stem(snapshot.sigma_rel))
                yield recipe.weights[snapshot], load_tensors(folder, file, meta)
