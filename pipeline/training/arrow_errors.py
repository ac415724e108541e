"""What S3 answers to Ray, which reads and writes checkpoints through pyarrow and not through this project's storage."""

__all__ = ["may_pass"]

_REFUSALS = {"ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND"}
_REFUSALS |= {"INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "INVALID_SIGNATURE", "SIGNATURE_DOES_NOT_MATCH"}


def may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed later: S3 was away, too slow or too busy.

    pyarrow raises OSError without a number for whatever S3 answers, and gives a request 3 s. One of the answers is
    NO_SUCH_UPLOAD: a busy store has done what was asked, too late, and does not know the second request for it.
    """
    text = str(error)
    return isinstance(error, OSError) and "AWS Error" in text and not any(word in text for word in _REFUSALS)
