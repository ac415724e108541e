"""Who writes a run: claims that exactly one driver can win, and the end of runs whose driver is gone.

MLflow has no locks and its tags are overwritten, but a param is written once: of several ``log_param`` with one key and
different values, the store takes one (the key is part of the table's primary key). So a driver claims a run by writing
the param ``zz.driver.N``, where N-1 is the last driver's number; whoever comes second is told so. The highest number
owns the run, until its tag ``ddpm.released`` carries that number. Whoever ends a run of a dead driver writes a claim as
well, so that ending it and taking it over exclude each other.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "CREATOR",
    "HEARTBEAT",
    "OWNER",
    "RELEASED",
    "Claim",
    "claim",
    "close",
    "close_abandoned",
    "holder_of",
    "latest_claim",
    "try_claim",
    "without_claims",
    "write_once",
]

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
"""A RUNNING run whose driver has been silent for this long may be taken over."""
CLOCK_SECONDS = 60.0
"""Clocks of two machines are trusted to agree this well; beyond it only what is watched counts."""
ABANDONED_SECONDS = 600.0
"""A run of another machine is marked KILLED by a bystander, or taken over unwatched, after this silence."""

CREATOR, OWNER, HEARTBEAT, RELEASED = "ddpm.creator", "ddpm.owner", "ddpm.heartbeat", "ddpm.released"
_ENDED = "ddpm.ended"
_DRIVER = "zz.driver."
"""Sorts behind every knob, which MLflow's pages show first."""
_EARLIER = "ddpm.driver."
"""Its name in earlier versions, whose runs still have it."""


@functools.cache
def _machine() -> str:
    """Where a process id means something: host name, start of the machine and process namespace (containers)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host's name has to do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A driver's claim on a run, or a bystander's, that ends it."""

    number: int
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=_machine)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    ended: str = ""
    """Why a bystander ended the run; empty for a driver's claim."""
    is_final: bool = False
    """Whether a driver that lives after all must leave it so."""

    @property
    def owner(self) -> str:
        """The driver in words: ``host:pid``."""
        return f"{self.host}:{self.pid}"

    @property
    def key(self) -> str:
        """The param that holds the claim."""
        return f"{_DRIVER}{self.number}"

    def to_json(self) -> str:
        """The value of the param."""
        return json.dumps({name: value for name, value in asdict(self).items() if value or name == "number"})

    def is_own(self) -> bool:
        """Whether this process made it."""
        return self.machine == _machine() and self.pid == os.getpid()

    def process_lives(self) -> bool | None:
        """Whether the driver's process lives; None if it is not of this machine (or container)."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            # Process ids are given again; whoever has it now and began after the claim is somebody else.
            return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < self.time + CLOCK_SECONDS
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


def latest_claim(run: "Run") -> Claim | None:
    """The claim with the highest number; number 0 is whoever created the run and has not claimed it yet."""
    claims = {
        int(key.rpartition(".")[2]): text
        for key, text in run.data.params.items()
        if key.startswith((_DRIVER, _EARLIER))
    }
    text = claims[max(claims)] if claims else run.data.tags.get(CREATOR)
    return Claim(**json.loads(text)) if text else None


def holder_of(run: "Run") -> Claim | None:
    """Who owns the run, dead or alive; None if its last driver has released it."""
    latest = latest_claim(run)
    if latest is None or latest.ended or run.data.tags.get(RELEASED, "").partition(" ")[0] == str(latest.number):
        return None
    return latest


def without_claims(params: Mapping[str, str]) -> dict[str, str]:
    """The params that are the run's config."""
    return {key: value for key, value in params.items() if not key.startswith((_DRIVER, _EARLIER))}


def try_claim(client: "MlflowClient", run_id: str, wanted: Claim) -> bool:
    """Writes a claim; false if another one has the number. Raises ``MlflowException`` if MLflow is away."""
    return write_once(
        wanted.to_json(),
        write=lambda value: client.log_param(run_id, wanted.key, value, synchronous=True),
        read=lambda: client.get_run(run_id).data.params.get(wanted.key),
    )


def write_once(value: str, *, write: Callable[[str], Any], read: Callable[[], str | None]) -> bool:
    """Writes a param that MLflow takes once; false if it holds another value. Raises as ``try_claim``."""
    from mlflow.exceptions import MlflowException

    try:
        write(value)
    except MlflowException:
        # Perhaps the answer was lost, or MLflow refused for another reason: the param itself tells.
        written = read()
        if written is None:
            raise
        return written == value
    return True


def claim(client: "MlflowClient", run: "Run") -> Claim:
    """Makes this process the run's driver.

    Raises:
        UserError: A live driver is writing the run, or another one took it at the same moment.
    """
    while True:
        run = _wait_until_free(client, run)
        latest = latest_claim(run)
        wanted = Claim(number=latest.number + 1 if latest else 1)
        if try_claim(client, run.info.run_id, wanted):
            return wanted
        run = client.get_run(run.info.run_id)
        if (holder := holder_of(run)) is not None:
            raise _live(run, holder)


def _wait_until_free(client: "MlflowClient", run: "Run") -> "Run":
    """Returns the run as it is once no driver holds it.

    Of a driver on another machine only its heartbeat can tell, and clocks differ: it is watched. A retried job, whose
    first driver died a moment ago, waits until it is sure and then goes on.
    """
    holder, sign, begin = holder_of(run), _last_sign(run), time.monotonic()
    while holder is not None and not holder.is_own():
        silent, watched, lives = time.time() - sign, time.monotonic() - begin, holder.process_lives()
        if lives is False or (lives and silent >= STALE_SECONDS) or (lives is None and _is_silent(silent, watched)):
            break
        if lives:
            raise _live(run, holder)
        logger.info("run %s: waiting to see whether its driver %s is alive", run.info.run_name, holder.owner)
        time.sleep(min(5.0, STALE_SECONDS / 5))
        run = client.get_run(run.info.run_id)
        if (now := holder_of(run)) is not None and (now != holder or _last_sign(run) != sign):
            raise _live(run, now)
        holder = now
    return run


def _is_silent(silent: float, watched: float) -> bool:
    """Whether a driver elsewhere is taken for dead, of which no sign was seen for ``watched`` seconds.

    After an outage of MLflow all drivers have been silent for long, so even then each gets the time for a heartbeat.
    """
    surely = silent >= STALE_SECONDS + CLOCK_SECONDS and watched >= 2 * HEARTBEAT_SECONDS
    return silent >= ABANDONED_SECONDS or surely or watched >= STALE_SECONDS


def _last_sign(run: "Run") -> float:
    """When the run's driver was last heard of, in seconds since 1970 by its own clock."""
    latest = latest_claim(run)
    return max(float(run.data.tags.get(HEARTBEAT, 0)), latest.time if latest else 0.0)


def _live(run: "Run", holder: Claim) -> UserError:
    return UserError(
        f"run {run.info.run_name!r} is being written by a live driver ({holder.owner}, last seen "
        f"{max(0.0, time.time() - _last_sign(run)):.0f} s ago); wait for it, end it, or choose another --name"
    )


def close(client: "MlflowClient", run: "Run", reason: str, *, is_final: bool = False) -> bool:
    """Ends a run in its driver's stead; false if a driver has claimed it meanwhile."""
    from mlflow.entities import RunTag

    latest = latest_claim(run)
    number, _, said = run.data.tags.get(RELEASED, "").partition(" ")
    # The driver said how it ended, and died before it could set that.
    status = said if latest is not None and number == str(latest.number) else "KILLED"
    wanted = Claim(number=latest.number + 1 if latest else 1, ended=reason, is_final=is_final)
    if not try_claim(client, run.info.run_id, wanted):
        return False
    client.log_batch(run.info.run_id, tags=[RunTag(_ENDED, reason)])
    client.set_terminated(run.info.run_id, status)
    return True


def close_abandoned(client: "MlflowClient", runs: Iterable["Run"]) -> list[str]:
    """Ends those RUNNING runs whose driver is surely gone; returns their names."""
    return [str(run.info.run_name) for run in runs if (reason := _why_over(run)) and close(client, run, reason)]


def _why_over(run: "Run") -> str | None:
    """Why nobody writes a run any more that says RUNNING; None if somebody may do so."""
    holder, silent = holder_of(run), time.time() - _last_sign(run)
    if holder is None:
        return "its driver ended and could not say so"
    lives = holder.process_lives()
    if lives is False:
        return f"its driver {holder.owner} is gone"
    if lives is None and silent >= ABANDONED_SECONDS:
        return f"its driver {holder.owner} was silent for {silent:.0f} s"
    return None
