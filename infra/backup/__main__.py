"""Copies everything that cannot be made again out of PostgreSQL and S3, and puts it back.

    python infra/backup save FOLDER       # while runs go on, or not
    python infra/backup restore FOLDER    # into empty services, nothing running; again if it broke off

Reads PGHOST, PGPORT, PGUSER and PGPASSWORD, the AWS settings, and DDPM_HOME, whose bucket is copied as a whole.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

import bucket
import runs
from databases import NAMES, Databases
from errors import BackupError

MANIFEST = "backup.json"


def save(folder: Path, databases: Databases) -> str:
    """Makes a back-up in a new folder; the manifest, written last, says that it is whole.

    The order keeps a back-up of a live system consistent, since each store may be ahead of the one before, never
    behind. First what runs resume from: a run that goes on from there sends MLflow nothing twice. Then the records.
    Then artifacts, which are written before the records that name them, and are never changed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BackupError(f"{folder} is not empty; give a new folder for each back-up")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    store = bucket.Bucket.of_environment()
    files = runs.save(store, folder / "s3")
    dumps = databases.save(folder / "postgres")
    files += store.save(folder / "s3", (entry for entry in store.objects() if not entry.key.startswith(store.runs)))
    now = datetime.datetime.now(datetime.UTC).isoformat()
    (folder / MANIFEST).write_text(json.dumps({"time": now, "bucket": store.name, "files": files + dumps}, indent=1))
    num_bytes = sum(entry["num_bytes"] for entry in files + dumps)
    return f"{len(files)} objects and {len(dumps)} databases, {num_bytes / 1e6:.1f} MB, in {folder}"


def restore(folder: Path, databases: Databases) -> str:
    """Puts a back-up into empty stores, or goes on where a restore broke off; compares every sha256 first."""
    try:
        record = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise BackupError(f"{folder} holds no whole back-up: there is no {MANIFEST}") from error
    for entry in record["files"]:
        bucket.check(bucket.inside(folder, entry["path"]), entry["sha256"])
    store = bucket.Bucket.of_environment()
    if store.name != record["bucket"]:
        raise BackupError(f"the back-up is of bucket {record['bucket']}, DDPM_HOME is in {store.name}")
    objects = [entry for entry in record["files"] if entry["path"].startswith("s3/")]
    there = store.restored(objects)
    databases.restore(folder / "postgres")
    count = store.restore(folder / "s3", objects, there)
    return f"restored {count} objects and {len(NAMES)} databases of {record['time']}"


def main(argv: list[str]) -> int:
    """Runs one verb."""
    parser = argparse.ArgumentParser(prog="python infra/backup", description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=("save", "restore"))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--compose",
        type=Path,
        metavar="FILE",
        help="PostgreSQL is that of this compose.yaml: run its own programs there",
    )
    given = parser.parse_args(argv)
    os.umask(0o077)  # MLflow's users and every result are in it
    try:
        print({"save": save, "restore": restore}[given.verb](given.folder, Databases(compose=given.compose)))
    except (BackupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
