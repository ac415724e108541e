"""The one seam to bytes: local paths and ``s3://`` URIs behind the same functions.

A *location* is an absolute local path (``/data/cifar10``) or an S3 URI (``s3://bucket/prefix``). Writes appear whole or
not at all. Endpoint, region, credentials, retries and addressing style of S3 come from the standard AWS environment and
files; they never pass through here.
"""

from pipeline.storage.clock import clock_offset_seconds
from pipeline.storage.listing import FileEntry, expand, list_entries, list_files
from pipeline.storage.locations import PARTIAL, home, is_remote, join, resolve
from pipeline.storage.patience import UnreachableError, patiently
from pipeline.storage.reading import exists, num_bytes, open_binary, read_bytes, read_chunks, read_range
from pipeline.storage.s3_client import s3 as _s3  # noqa: F401  for tests, which make buckets
from pipeline.storage.s3_client import s3_of_process as _s3_of_process  # noqa: F401  for tests, which change settings
from pipeline.storage.writing import remove, sha256_hex, write_bytes

__all__ = [
    "PARTIAL",
    "FileEntry",
    "UnreachableError",
    "clock_offset_seconds",
    "exists",
    "expand",
    "home",
    "is_remote",
    "join",
    "list_entries",
    "list_files",
    "num_bytes",
    "open_binary",
    "patiently",
    "read_bytes",
    "read_chunks",
    "read_range",
    "remove",
    "resolve",
    "sha256_hex",
    "write_bytes",
]
