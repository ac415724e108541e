"""Where workers and controller leave messages for the driver, and how they tell it what cannot be mended.

The actor's process imports this module alone: it loads neither torch nor Ray Train, which would cost the start of a run
seconds.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.tracking import TIMESTAMP, TrackedRun
from pipeline.training.spool import Spool, spool_folder

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import Checkpoint

    from pipeline.training.worker import Record

__all__ = ["Committed", "Mailbox", "open_mailbox"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Committed:
    """A checkpoint that the controller has committed to storage."""

    step: int
    checkpoint: "Checkpoint"


class Mailbox:
    """A Ray actor on the driver's node: workers put, the driver takes."""

    def __init__(self, spool: Path) -> None:
        """Opens the spool; after a restart by Ray it holds what the driver may not have taken yet."""
        self._spool = Spool(spool)
        self._items: list[Record | Committed] = [*self._spool.records]
        self._verdict: str | None = None

    def give_up(self, reason: str) -> None:
        """Notes why trying again from the last checkpoint is in vain; the first reason stays."""
        self._verdict = self._verdict or reason

    def try_again(self) -> None:
        """Takes the verdict back: what it was about is mended."""
        self._verdict = None

    def verdict(self) -> str | None:
        """The reason of ``give_up``, or None."""
        return self._verdict

    def put(self, item: "Record | Committed") -> None:
        """Adds a message; once this has returned, a record outlives every process."""
        if isinstance(item, Committed):
            self._items.append(item)
            return
        # The time of the first try: a record that is sent twice is then the same record to MLflow.
        record = {**item, TIMESTAMP: time.time() * 1000}
        self._items.append(record)
        try:
            self._spool.append(record)
        except OSError as error:
            logger.warning("a record is kept in memory only: %s", error)

    def take_all(self) -> "list[Record | Committed]":
        """All messages since the last call, in the order of their coming."""
        items, self._items = self._items, []
        return items


def open_mailbox(run: TrackedRun) -> "ActorHandle[Mailbox]":
    """Starts a mailbox beside the driver, whose disk it writes to; it lives as long as the driver's machine does."""
    spool_folder(run).mkdir(parents=True, exist_ok=True)  # if that fails, it fails here, in one line
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    return cast("ActorHandle[Mailbox]", actor.remote(spool_folder(run)))
