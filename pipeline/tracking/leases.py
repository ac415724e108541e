"""Who evaluates a checkpoint: a lease that exactly one evaluator can take, kept alive by its heartbeat.

As with runs (``ownership``), a param decides: lease N on a checkpoint by a protocol is the LoggedModel's param
``ddpm.lease.PROTOCOL.N``, which MLflow writes once. A tag beside it, which only the holder writes, says how the holder
does: its last heartbeat, how far it is, how it ended. A lease whose holder is silent or dead is over; the next one has
the next number.
"""

import contextlib
import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pipeline.errors import WorldError, first_line
from pipeline.tracking import ownership
from pipeline.tracking.checkpoints import EVAL_STATUS, Checkpoint, checkpoint_of
from pipeline.tracking.ownership import Claim
from pipeline.tracking.runs import one_line_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MAX_FAILURES", "Lease", "LostLeaseError", "Standing", "standing", "take"]

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""After so many failures a checkpoint counts as failed for that protocol."""


class LostLeaseError(WorldError):
    """Another evaluator has the checkpoint by now: this one may not write a result any more."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """The tag: what the holder of a lease says."""

    number: int = 0
    state: Literal["running", "released", "failed"] = "released"
    time: float = 0.0
    chunks: int = 0
    """Chunks that this holder has made."""
    failures: int = 0
    """Failures up to now, in a row."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a checkpoint stands with its evaluators."""

    number: int
    """Of the last lease; 0: there was none."""
    holder: Claim | None
    """Who is evaluating it."""
    failures: int
    reason: str
    """Of the last failure."""

    @property
    def has_failed(self) -> bool:
        """Whether it is given up."""
        return self.failures >= MAX_FAILURES


class Lease:
    """This process's lease on a checkpoint, a context in which it is kept alive."""

    def __init__(self, client: "MlflowClient", model_id: str, identity: str, state: _State) -> None:
        self._client, self._model_id, self._identity, self._state = client, model_id, identity, state
        self._is_over, self._is_lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(replace(self._state, state="released", failures=0 if kind is None else self._state.failures))

    @property
    def is_lost(self) -> bool:
        """Whether a heartbeat has found that another evaluator took it."""
        return self._is_lost

    def advance(self) -> None:
        """Says that one more chunk was made: a checkpoint that gets on is no failure, whoever dies."""
        self._state = replace(self._state, chunks=self._state.chunks + 1)

    def release(self) -> None:
        """Ends the lease: neither done nor failed."""
        self._end(replace(self._state, state="released"))

    def fail(self, reason: str) -> None:
        """Ends the lease with a failure."""
        failures = self._state.failures + 1
        self._end(replace(self._state, state="failed", failures=failures, reason=reason))

    @one_line_errors
    def check(self) -> None:
        """Asks MLflow whether the lease still holds.

        Raises:
            LostLeaseError: Another evaluator took it.
            WorldError: MLflow is away.
        """
        now = checkpoint_of(self._client.get_logged_model(self._model_id))
        if _latest(now, self._identity) > self._state.number:
            raise LostLeaseError(f"another evaluator has taken over {now.run_name} step {now.step}")

    def _end(self, state: _State) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # MLflow lets through whatever its store raises. The lease runs out then.
            self.check()
            self._say(state)
            if state.failures >= MAX_FAILURES:
                self._client.set_logged_model_tags(self._model_id, {EVAL_STATUS: "failed"})

    def _beat(self) -> None:
        while not self._is_over.wait(ownership.HEARTBEAT_SECONDS):
            try:
                self.check()
                self._say(self._state)
            except LostLeaseError:
                self._is_lost = True
                return
            except Exception as error:  # As above; the next beat tries again.
                logger.debug("the lease was not renewed: %s", first_line(error))

    def _say(self, state: _State) -> None:
        text = json.dumps(asdict(replace(state, time=round(time.time(), 1))))
        self._client.set_logged_model_tags(self._model_id, {_tag(self._identity): text})


def standing(checkpoint: Checkpoint, identity: str) -> Standing:
    """How a checkpoint stands with a protocol, by what its LoggedModel said when it was read."""
    number = _latest(checkpoint, identity)
    said = _State(**json.loads(checkpoint.tags.get(_tag(identity), "{}")))
    if number == 0 or (said.number == number and said.state != "running"):
        return Standing(number=number, holder=None, failures=said.failures, reason=said.reason)
    claim = Claim(**json.loads(checkpoint.params[_param(identity, number)]))
    own = said if said.number == number else _State(failures=said.failures)
    silent = time.time() - max(claim.time, own.time)
    if claim.process_lives() is not False and silent < ownership.STALE_SECONDS + ownership.CLOCK_SECONDS:
        return Standing(number=number, holder=claim, failures=own.failures, reason=own.reason)
    died = f"its evaluator {claim.owner} died before the first chunk was done"
    failures, reason = (own.failures, own.reason) if own.chunks else (own.failures + 1, died)
    return Standing(number=number, holder=None, failures=failures, reason=reason)


def take(client: "MlflowClient", checkpoint: Checkpoint, identity: str, stands: Standing) -> Lease | None:
    """Takes a lease that nobody holds; None if another evaluator took it at the same moment.

    Args:
        client: Connected to MLflow.
        checkpoint: What is to be evaluated.
        identity: By which protocol.
        stands: How it stood when it was read a moment ago.
    """
    claim = Claim(number=stands.number + 1)
    key = _param(identity, claim.number)
    if not ownership.write_once(
        claim.to_json(),
        write=lambda value: client.log_model_params(checkpoint.model_id, {key: value}),
        read=lambda: checkpoint_of(client.get_logged_model(checkpoint.model_id)).params.get(key),
    ):
        return None
    failures = 0 if stands.has_failed else stands.failures  # One that has failed is taken only to be tried anew.
    state = _State(number=claim.number, state="running", failures=failures, reason=stands.reason)
    lease = Lease(client, checkpoint.model_id, identity, state)
    lease._say(state)
    return lease


def _latest(checkpoint: Checkpoint, identity: str) -> int:
    prefix = _param(identity, "")
    return max((int(key.removeprefix(prefix)) for key in checkpoint.params if key.startswith(prefix)), default=0)


def _param(identity: str, number: int | str) -> str:
    return f"ddpm.lease.{identity}.{number}"


def _tag(identity: str) -> str:
    return f"lease.{identity}"
