"""All objects of the bucket, as files."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from errors import BackupError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The bucket that ``$DDPM_HOME`` lies in."""

    name: str
    prefix: str
    """Where ``$DDPM_HOME`` is in it, with a slash at its end; empty at the top."""
    client: "S3Client"

    @classmethod
    def of_environment(cls) -> "Bucket":
        """Reads ``DDPM_HOME`` and the AWS settings.

        Raises:
            BackupError: ``DDPM_HOME`` is no S3 address.
        """
        home = os.environ.get("DDPM_HOME", "")
        if not home.startswith("s3://"):
            raise BackupError(
                f"DDPM_HOME={home or '(not set)'}: give s3://BUCKET/PREFIX; local folders copy as they are"
            )
        name, _, prefix = home.removeprefix("s3://").strip("/").partition("/")
        client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
        return cls(name=name, prefix=f"{prefix}/" if prefix else "", client=client)

    def save(self, folder: Path, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        """Copies the objects whose key is wanted; one that is deleted meanwhile is left out."""
        found = []
        for key in filter(wanted, self._keys()):
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.client.download_file(self.name, key, str(path))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
                    continue
                raise BackupError(f"s3://{self.name}/{key}: {error}") from error
            found.append(describe(folder.parent, path))
        return found

    def restore(self, folder: Path, files: Sequence[dict[str, Any]]) -> int:
        """Writes the objects again."""
        for entry in files:
            path = folder.parent / entry["path"]
            try:
                self.client.upload_file(str(path), self.name, path.relative_to(folder).as_posix())
            except Exception as error:
                raise BackupError(f"s3://{self.name}: {error}") from error
        return len(files)

    def is_empty(self) -> bool:
        """Whether there is no object in it."""
        return next(self._keys(), None) is None

    def _keys(self) -> Iterator[str]:
        try:
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name):
                # A key that ends in a slash is a folder of some servers, and no file.
                yield from (entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/"))
        except (ClientError, BotoCoreError) as error:
            raise BackupError(f"s3://{self.name}: {error}") from error


def describe(root: Path, path: Path) -> dict[str, Any]:
    """A file's place below ``root``, its size and sha256."""
    return {"path": path.relative_to(root).as_posix(), "num_bytes": path.stat().st_size, "sha256": _sha256(path)}


def check(path: Path, sha256: str) -> None:
    """Compares a file with what it was.

    Raises:
        BackupError: It is missing or changed.
    """
    if not path.is_file():
        raise BackupError(f"{path} is missing from the back-up")
    if _sha256(path) != sha256:
        raise BackupError(f"{path} was changed or cut short since the back-up was made")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
