"""All objects of the bucket, as files."""

import hashlib
import os
from collections.abc import Container, Iterable, Iterator, Sequence
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
class Object:
    """An object as a listing shows it."""

    key: str
    etag: str


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

    @property
    def runs(self) -> str:
        """Where the folders that runs resume from lie."""
        return f"{self.prefix}runs/"

    def objects(self, prefix: str = "", delimiter: str = "") -> Iterator[Object]:
        """What is there now; with a delimiter not what lies deeper."""
        for page in self._pages(prefix, delimiter):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a folder of some servers, and no file
                    yield Object(key=entry["Key"], etag=entry.get("ETag", ""))

    def folders(self, prefix: str) -> list[str]:
        """The prefixes one level below."""
        return [entry["Prefix"] for page in self._pages(prefix, "/") for entry in page.get("CommonPrefixes", [])]

    def save(self, folder: Path, objects: Iterable[Object]) -> list[dict[str, Any]]:
        """Copies objects; one that is deleted meanwhile is left out.

        Raises:
            BackupError: A key is no path of a file in the folder, or S3 refuses.
        """
        found = []
        for key in (entry.key for entry in objects):
            path = inside(folder, key)
            if path.is_dir() or any(parent.is_file() for parent in path.parents if parent.is_relative_to(folder)):
                raise BackupError(f"s3://{self.name}/{key} is an object and a folder at once: rename one of them")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.client.download_file(self.name, key, str(path))
            except (ClientError, BotoCoreError) as error:
                code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
                if code in ("404", "NoSuchKey"):
                    continue
                raise BackupError(f"s3://{self.name}/{key}: {error}") from error
            found.append(describe(folder.parent, path))
        return found

    def restore(self, folder: Path, files: Sequence[dict[str, Any]], there: Container[str] = ()) -> int:
        """Writes the objects again, but those that are there already."""
        paths = {entry["path"].removeprefix(f"{folder.name}/"): folder.parent / entry["path"] for entry in files}
        for key in (key for key in paths if key not in there):
            try:
                self.client.upload_file(str(paths[key]), self.name, key)
            except Exception as error:
                raise BackupError(f"s3://{self.name}: {error}") from error
        return len(files)

    def restored(self, files: Sequence[dict[str, Any]]) -> set[str]:
        """Keys that a restore which broke off left behind.

        Raises:
            BackupError: There is anything else.
        """
        expected = {entry["path"].removeprefix("s3/"): entry["sha256"] for entry in files}
        found = {entry.key for entry in self.objects()}
        for key in sorted(found):
            if key not in expected or self._sha256(key) != expected[key]:
                raise BackupError(f"bucket {self.name} holds {key}, not of this back-up; restore into an empty bucket")
        return found

    def _sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        try:
            for chunk in self.client.get_object(Bucket=self.name, Key=key)["Body"].iter_chunks(2**20):
                digest.update(chunk)
        except (ClientError, BotoCoreError) as error:
            raise BackupError(f"s3://{self.name}/{key}: {error}") from error
        return digest.hexdigest()

    def _pages(self, prefix: str, delimiter: str = "") -> Iterator[Any]:
        try:
            yield from self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix, Delimiter=delimiter
            )
        except (ClientError, BotoCoreError) as error:
            raise BackupError(f"s3://{self.name}: {error}") from error


def inside(folder: Path, key: str) -> Path:
    """The file of a key.

    Raises:
        BackupError: It would lie outside the folder, or be the file of another key as well.
    """
    path = folder / key
    if {"", ".", ".."} & set(key.split("/")) or not path.resolve().is_relative_to(folder.resolve()):
        raise BackupError(f"{key!r} is no name of a file in {folder}; rename or delete the object")
    return path


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
