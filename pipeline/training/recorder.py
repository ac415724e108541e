"""What the driver does while workers train: metrics to MLflow, checkpoints published, signs of life, progress lines.

Workers and the Ray Train controller only put messages into a mailbox; the driver alone talks to MLflow (design
decision 9). A server that is away for a while costs nothing: results wait in the spool on the driver's disk, and are
sent when it is back, by this driver or by the next one of the run.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.errors import WorldError, first_line
from pipeline.tracking import TIMESTAMP, TakenOverError, TrackedRun
from pipeline.training.arrow_errors import may_pass
from pipeline.training.background import Background
from pipeline.training.checkpoint import save_published
from pipeline.training.mailbox import Committed, Mailbox
from pipeline.training.progress import Lines, Progress
from pipeline.training.quality import Quality
from pipeline.training.spool import CHECKPOINTS, Leftovers, spool_folder
from pipeline.training.worker import Record

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 10.0
_POLL_SECONDS = 1.0
_BATCH_SECONDS = 2.0
"""Records of so long go to MLflow in one request: each costs the server the same, whatever is in it."""
_PATIENCE_SECONDS = 120.0
_STOP_SECONDS = 5.0


class Recorder:
    """Empties the mailbox into MLflow. ``turn`` is called about twice a second, ``finish`` once at the end."""

    def __init__(
        self,
        run: TrackedRun,
        config: TrainConfig,
        mailbox: "ActorHandle[Mailbox]",
        *,
        tags: Mapping[str, str],
        quality: Quality | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Looks up what an earlier driver of this run has already sent.

        Args:
            run: The MLflow run, owned by this process.
            config: The run's config.
            mailbox: Where workers and controller put messages.
            tags: Tags of every published checkpoint.
            quality: Measures published checkpoints; nobody does when left out.
            progress: Shows records; plain lines when left out.
        """
        self._run = run
        self._config = config
        self._mailbox = mailbox
        self._tags = tags
        self._quality = quality
        self._unsorted: list[Record] = []
        self._unsent: list[Record] = []
        self._unpublished: list[_Publication] = []
        # After a failure Ray Train repeats steps. They are the same steps with the same values, and MLflow would
        # append them: each step is sent once.
        self._logged = {"train/loss": run.logged_steps("train/loss")}
        self._published = run.published_steps()
        self._spool = spool_folder(run)
        self._leftovers = Leftovers(self._spool)
        # Ray Train keeps few checkpoints: what is published is copied as soon as it is committed, whatever MLflow does.
        self._copier = Background("copy")
        # An upload takes seconds to minutes; signs of life must not wait for it.
        self._publisher = Background("publish")
        self._publishing: Future[bool] | None = None
        self._next_try = self._next_batch = 0.0
        self._progress = progress or Lines(config.steps)
        self.last_record: Record = {}
        self.saved_step: int | None = None

    def turn(self) -> None:
        """Takes what has come and sends what can be sent; never raises because MLflow is away.

        Raises:
            TakenOverError: Another driver owns the run.
        """
        self._fetch()
        if time.monotonic() < self._next_try:
            return
        try:
            self._send()
        except TakenOverError:
            raise
        except Exception as error:  # MLflow passes on whatever requests, SQLAlchemy, botocore or the disk raise.
            self._next_try = time.monotonic() + _RETRY_SECONDS
            logger.warning("MLflow does not take records at the moment; kept and sent later (%s)", first_line(error))

    def finish(self) -> None:
        """Takes and sends the rest; waits ``_PATIENCE_SECONDS`` for an MLflow that is away.

        Raises:
            TakenOverError: Another driver owns the run.
            WorldError: MLflow stayed away; says what is missing there and where it is kept.
        """
        self._send_rest(give_up=time.monotonic() + _PATIENCE_SECONDS)
        if self._quality is not None:
            self._unsorted += self._quality.finish()
            self._send_rest(give_up=time.monotonic() + _PATIENCE_SECONDS)
        self._leftovers.remove()

    def _send_rest(self, give_up: float) -> None:
        self._fetch()
        while True:
            try:
                self._send(at_once=True)
                if not self._unsent and not self._unpublished:
                    break
                time.sleep(0.05)
            except TakenOverError:
                raise
            except Exception as error:
                if time.monotonic() > give_up:
                    raise WorldError(
                        f"training is done, but MLflow lacks {len(self._unsent)} metric records and "
                        f"{len(self._unpublished)} checkpoints: {first_line(error)}. They are kept in {self._spool}; "
                        "run the same command again on this machine"
                    ) from error
                time.sleep(_POLL_SECONDS)

    def save_what_there_is(self) -> None:
        """After a failure: sends records and publishes committed checkpoints, as far as MLflow takes them."""
        self._stop_measuring()
        try:
            self.finish()
        except TakenOverError:
            return  # that is the failure
        except WorldError as error:
            logger.warning("%s", error)

    def save_records(self) -> None:
        """After an interrupt, when only seconds are left: sends the records. Checkpoints are published on resume."""
        self._stop_measuring()
        try:
            self._fetch()
            self._sort()
            self._run.log_metrics(self._unsent)
        except Exception as error:  # The interrupt is what ends the run, not this.
            logger.warning("metric records are kept in %s, to be sent on resume: %s", self._spool, first_line(error))

    def _stop_measuring(self) -> None:
        if self._quality is not None:
            self._quality.stop()

    def publish(self, committed: Committed) -> None:
        """Queues a committed checkpoint that is not published yet, or not measured though it is the last."""
        step = committed.step
        if self._is_unknown(step):
            patience = self._config.data.storage_patience_seconds
            copy = self._copier.submit(_copy, committed, self._spool / CHECKPOINTS / str(step), patience)
            self._queue(step, copy)

    def _queue(self, step: int, copy: "Future[Path]") -> None:
        if self._is_unknown(step):
            self._unpublished.append(_Publication(step=step, copy=copy, is_published=step in self._published))

    def _is_unknown(self, step: int) -> bool:
        if any(step == other.step for other in self._unpublished):
            return False
        return step not in self._published or (self._quality is not None and self._quality.lacks(step))

    def _fetch(self) -> None:
        if self._quality is not None:
            self._unsorted += self._quality.turn()
        # Ray's stubs lose the type of an actor method's result.
        for item in cast(Any, ray).get(cast(Any, self._mailbox).take_all.remote()):
            if isinstance(item, Committed):
                self.saved_step = item.step
                self.publish(item)
            elif _key(item) in self._logged:
                self._note(item)
            else:
                self._unsorted.append(item)

    def _sort(self) -> None:
        """Queues what earlier drivers left, and records of which only MLflow can say whether it has them."""
        records, checkpoints = self._leftovers.take()
        self._unsorted += records
        for step, folder in checkpoints:
            copy: Future[Path] = Future()
            copy.set_result(folder)
            self._queue(step, copy)
        while self._unsorted:
            key = _key(self._unsorted[0])
            if key not in self._logged:
                self._logged[key] = self._run.logged_steps(key)
            self._note(self._unsorted.pop(0))

    def _note(self, record: Record) -> None:
        steps = self._logged[_key(record)]
        if record["step"] in steps:
            return
        steps.add(int(record["step"]))
        self._unsent.append({TIMESTAMP: time.time() * 1000, **record})
        if "train/loss" in record:
            self.last_record = record
            self._progress.show(record)

    def _send(self, *, at_once: bool = False) -> None:
        self._run.heartbeat()
        self._sort()
        if self._unsent and (at_once or time.monotonic() >= self._next_batch):
            self._run.log_metrics(self._unsent)
            self._unsent.clear()
            self._next_batch = time.monotonic() + _BATCH_SECONDS
        if self._publishing is not None and self._publishing.done():
            done, self._publishing = self._publishing, None
            is_published = done.result()
            publication = self._unpublished.pop(0)
            if is_published:
                self._published.add(publication.step)
        if self._unpublished and self._publishing is None:
            self._publishing = self._publisher.submit(self._publish, self._unpublished[0])

    def _publish(self, publication: "_Publication") -> bool:
        """One step after the other, each done once: a later one that fails is tried again without the earlier.

        Returns:
            Whether it is published; not if storage could not give it. It may be offered again.
        """
        try:
            folder = publication.copy.result()
        except (OSError, WorldError) as error:
            logger.warning("the checkpoint of step %d cannot be published: %s", publication.step, first_line(error))
            return False
        if publication.tried and publication.step in self._run.published_steps():
            publication.is_published = True
        publication.tried = True
        if not publication.is_published:
            self._run.publish(folder, publication.step, self._tags)
            publication.is_published = True
        if self._quality is not None:
            self._quality.offer(publication.step, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return True


def _key(record: Record) -> str:
    """The metric by which a record is known to be logged: records are logged whole."""
    return next(name for name in record if name not in ("step", TIMESTAMP))


@dataclass(kw_only=True)
class _Publication:
    """A checkpoint on its way to MLflow, and how far it has come."""

    step: int
    copy: "Future[Path]"
    tried: bool = False
    is_published: bool = False


def _copy(committed: Committed, folder: Path, patience_seconds: float) -> Path:
    """Copies what is published of a checkpoint; waits for storage that is away."""

    def try_it() -> Path:
        try:
            return _copy_at_once(committed, folder)
        except OSError as error:
            if may_pass(error):
                raise storage.UnreachableError(f"step {committed.step}: {first_line(error)}") from error
            raise

    return storage.patiently(committed.checkpoint.path, patience_seconds, try_it)


def _copy_at_once(committed: Committed, folder: Path) -> Path:
    partial = folder.with_name(f"{folder.name}{storage.PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier copy may have failed half-way
    partial.mkdir(parents=True)
    with committed.checkpoint.as_directory() as checkpoint:
        save_published(Path(checkpoint), partial)
    return partial.replace(folder)  # a driver that dies leaves whole copies to the next one, or none
