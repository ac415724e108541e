"""How far the clock of an S3 server is from this machine's."""

import time
from email.utils import parsedate_to_datetime

from pipeline.storage.locations import split
from pipeline.storage.s3_client import s3, s3_errors

__all__ = ["clock_offset_seconds"]


def clock_offset_seconds(location: str) -> float:
    """Seconds by which the server that holds an ``s3://`` location is ahead of this machine, to about a second.

    Raises:
        UnreachableError: Storage did not answer.
        WorldError: Storage refused.
    """
    bucket, key = split(location)
    with s3_errors(location):
        answer = s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() - time.time() if date else 0.0
