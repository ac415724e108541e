"""The process's S3 client, configured by the user's AWS settings, and what its errors mean."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.errors import UserError, WorldError, first_line
from pipeline.storage.patience import UnreachableError

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session
    from mypy_boto3_s3 import S3Client

__all__ = ["s3", "s3_errors", "s3_of_process"]

_READER_THREADS = 32
_CONNECT_SECONDS = 10

_BUSY = {
    "InternalError", "RequestLimitExceeded", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequestsException",
}  # fmt: skip
"""Error codes that ask for patience whatever HTTP status they come with."""

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
_ENDPOINT = "check AWS_ENDPOINT_URL"
_ADVICE = {
    "301": "check AWS_DEFAULT_REGION",
    "403": f"{_KEYS} and what this user may do",
    "AccessDenied": "check what the user of AWS_ACCESS_KEY_ID (or AWS_PROFILE) may do",
    "AuthorizationHeaderMalformed": "check AWS_DEFAULT_REGION",
    "ExpiredToken": "renew AWS_SESSION_TOKEN",
    "InvalidAccessKeyId": _KEYS,
    "NoSuchBucket": f"make the bucket, or {_ENDPOINT}",
    "PermanentRedirect": "check AWS_DEFAULT_REGION",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": _KEYS,
}
"""What to do about a refusal, by S3's error code."""

_creating = threading.Lock()


def _replace_lock() -> None:
    # A thread of the parent may have held the lock at the fork; nobody would release it in the child.
    global _creating
    _creating = threading.Lock()


os.register_at_fork(after_in_child=_replace_lock)


def s3() -> "S3Client":
    """The client of this process, safe to share between its threads.

    Raises:
        UserError: The AWS settings are not valid.
    """
    # One client a process: a client that crosses a fork shares its sockets with the parent. Making one is not safe in
    # two threads at once.
    with _creating:
        return s3_of_process(os.getpid())


@lru_cache(maxsize=1)
def s3_of_process(_pid: int) -> "S3Client":
    """Makes a client from the standard AWS environment and files; ours are only the defaults that the user left open.

    Raises:
        UserError: The AWS settings are not valid.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    try:
        settings = botocore.session.get_session()
        session = boto3.Session(botocore_session=settings)
        config = Config(
            connect_timeout=_CONNECT_SECONDS, max_pool_connections=_READER_THREADS, retries=_retries(settings)
        )
        client = session.client("s3", config=config)
        if _is_amazon(client.meta.endpoint_url) or _chosen_addressing_style(settings):
            return client
        # Servers other than Amazon's seldom have a DNS name for each bucket.
        return session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    except ValueError as error:
        raise UserError(f"the AWS settings are not valid: {first_line(error)}") from error


def _retries(settings: "Session") -> Any:
    """Patient retries, unless the user said anything about retries."""
    mode = os.environ.get("AWS_RETRY_MODE") or settings.get_scoped_config().get("retry_mode")
    if mode or settings.get_config_variable("max_attempts") is not None:
        return None
    return {"mode": "adaptive", "total_max_attempts": 5}


def _chosen_addressing_style(settings: "Session") -> str | None:
    section = settings.get_scoped_config().get("s3")
    return section.get("addressing_style") if isinstance(section, dict) else None


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


@contextmanager
def s3_errors(location: str) -> Iterator[None]:
    """Turns botocore's errors into one clear line that names the location and never holds a secret.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreachableError: Storage did not answer, broke off or said that it cannot serve now.
        WorldError: Storage refused, or the AWS settings do not suffice to ask it.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise _meaning_of_answer(location, error) from error
    except BotoCoreError as error:
        raise _meaning_of_failure(location, error) from error
    except HTTPError as error:
        # botocore lets some errors of the connection pass through as they are while it reads a body.
        raise UnreachableError(f"cannot reach {location}: {first_line(error)}; {_ENDPOINT}") from error


def _meaning_of_answer(location: str, error: "ClientError") -> Exception:
    """The exception for an error that the server answered."""
    code = str(error.response.get("Error", {}).get("Code", "?"))
    if code in ("404", "NoSuchKey", "NotFound"):
        return FileNotFoundError(location)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())
    # 501 is a request that the server does not know; it will not learn it by waiting.
    if code in _BUSY or status == 429 or (status >= 500 and status != 501):
        return UnreachableError(f"S3 cannot serve {location} now: {code} {message}".strip())
    if status == 412:
        return WorldError(f"{location} changed while it was read; read it again")
    advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return WorldError(f"S3 refused {location}: {code} {message}".strip() + advice)


def _meaning_of_failure(location: str, error: "BotoCoreError") -> Exception:
    """The exception for a request that was not sent or got no answer."""
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError

    what = f"cannot reach {location}: {first_line(error)}"
    if isinstance(error, aws.FlexibleChecksumError):
        return WorldError(f"{location} is damaged: {first_line(error)}; write it again")
    if isinstance(error, aws.SSLError) and "certificate" in str(error).lower():
        return WorldError(f"{what}; check AWS_CA_BUNDLE and AWS_ENDPOINT_URL")
    if isinstance(error, (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)):
        return UnreachableError(f"{what}; {_ENDPOINT}")
    if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError)):
        return WorldError(f"{what}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, aws.ProfileNotFound):
        return WorldError(f"{what}; check AWS_PROFILE")
    if isinstance(error, ResponseParserError):
        return WorldError(f"{what}; is it an S3 server that answers there? {_ENDPOINT}")
    return WorldError(what)
