"""MLflow that is away or too busy: which errors say so, and how long to wait for it."""

import contextlib
import os
from collections.abc import Iterator

__all__ = ["is_outage", "patient_requests", "set_defaults"]

_CLASSES = {"ConnectTimeout", "ConnectTimeoutError", "ConnectionClosedError", "EndpointConnectionError"}
_CLASSES |= {"ConnectionError", "MaxRetryError", "NewConnectionError", "ReadTimeout", "ReadTimeoutError"}
"""Of botocore, requests and urllib3."""

_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
# An outage must not hold a driver that trains for minutes: few short retries, records are kept and sent later instead.
_IN_PASSING = {_RETRIES: "2", _TIMEOUT: "15"}
# Nothing goes on without what a start asks for. With the pauses between them this waits five minutes for a busy server.
_PATIENT = {_RETRIES: "4", _TIMEOUT: "60"}


def set_defaults() -> None:
    """Tells MLflow how long to wait for a server, unless the environment does."""
    for name, value in _IN_PASSING.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def patient_requests() -> Iterator[None]:
    """Waits longer for a busy server than while training, unless the environment says how long."""
    ours = {name: value for name, value in _IN_PASSING.items() if os.environ.get(name) == value}
    os.environ.update({name: _PATIENT[name] for name in ours})  # MLflow reads them for every request
    try:
        yield
    finally:
        os.environ.update(ours)


def is_outage(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that a server cannot be reached."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ in _CLASSES:
            return True
        error = error.__cause__ or error.__context__
    return False
