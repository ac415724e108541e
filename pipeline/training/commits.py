"""Runs in Ray Train's controller: tells the driver what is committed."""

from typing import TYPE_CHECKING, Any

from ray.train import Checkpoint, UserCallback

from pipeline.training.mailbox import Committed, Mailbox

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.v2._internal.execution.context import TrainRunContext

__all__ = ["TellCommits"]


class TellCommits(UserCallback):
    """Runs in the controller: passes on each checkpoint once it is committed, not when it is reported."""

    def __init__(self, mailbox: "ActorHandle[Mailbox]") -> None:
        self._mailbox = mailbox

    def after_report(
        self, run_context: "TrainRunContext", metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray Train with every rank's metrics of one report."""
        if checkpoint is not None:
            self._mailbox.put.remote(Committed(int(metrics[0]["step"]), checkpoint))
