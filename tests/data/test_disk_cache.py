"""The disk cache: fetched once, never above its limit, never wrong, whoever dies."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.disk_cache import DiskCache
from pipeline.data.manifest import ShardInfo
from pipeline.errors import UserError


def shard(folder: Path, number: int, size: int = 1000) -> tuple[str, ShardInfo]:
    """A file that stands for a remote shard: the cache reads it through ``storage`` alone."""
    data = bytes([number]) * size
    path = folder / f"{number}.tar"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return str(path), ShardInfo(name=path.name, index="", num_images=1, num_bytes=size, sha256=sha256, index_sha256="")


def take(cache: DiskCache, location: str, info: ShardInfo) -> bytes | None:
    descriptor = cache.open(location, info, patience_seconds=0)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("lock-")}


def fetch_count(folder: str, location: str, info: ShardInfo, counts: str) -> None:
    read_chunks = storage.read_chunks

    def counting(*arguments, **options):
        with open(counts, "a") as file:
            file.write("x")
        return read_chunks(*arguments, **options)

    storage.read_chunks = counting
    assert take(DiskCache(folder, 10_000), location, info) == bytes([7]) * 1000


def test_what_was_fetched_once_is_read_from_disk_though_the_source_is_gone(tmp_path):
    location, info = shard(tmp_path, 1)
    cache = DiskCache(str(tmp_path / "cache"), 10_000)
    assert take(cache, location, info) == bytes([1]) * 1000
    os.remove(location)
    assert take(DiskCache(str(tmp_path / "cache"), 10_000), location, info) == bytes([1]) * 1000


def test_four_processes_that_ask_at_once_fetch_once(tmp_path):
    location, info = shard(tmp_path, 7)
    counts = tmp_path / "counts"
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "cache"), location, info, str(counts))
    processes = [context.Process(target=fetch_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert counts.read_text() == "x"


def test_the_shard_used_longest_ago_is_dropped_and_the_limit_is_kept(tmp_path):
    cache = DiskCache(str(tmp_path / "cache"), 3_500)
    shards = [shard(tmp_path, number) for number in range(4)]
    for number, each in enumerate(shards[:3]):
        take(cache, *each)
        os.utime(tmp_path / "cache" / f"{each[1].sha256}.tar", (number, number))
    take(cache, *shards[0])  # used again: now the newest
    take(cache, *shards[3])
    assert held(tmp_path / "cache") == {f"{shards[number][1].sha256}.tar" for number in (0, 2, 3)}


def test_a_dropped_shard_stays_readable_for_who_has_it_open(tmp_path):
    cache = DiskCache(str(tmp_path / "cache"), 1_000)
    first, second = shard(tmp_path, 1), shard(tmp_path, 2)
    descriptor = cache.open(*first, patience_seconds=0)
    assert descriptor is not None
    take(cache, *second)
    assert held(tmp_path / "cache") == {f"{second[1].sha256}.tar"}
    assert os.pread(descriptor, 2000, 0) == bytes([1]) * 1000
    os.close(descriptor)


def test_a_damaged_source_is_not_kept(tmp_path):
    location, info = shard(tmp_path, 1)
    Path(location).write_bytes(b"x" * 1000)
    assert take(DiskCache(str(tmp_path / "cache"), 10_000), location, info) is None
    assert held(tmp_path / "cache") == set()


def test_a_missing_source_is_told_apart_and_leaves_nothing(tmp_path):
    location, info = shard(tmp_path, 1)
    os.remove(location)
    with pytest.raises(FileNotFoundError):
        take(DiskCache(str(tmp_path / "cache"), 10_000), location, info)
    assert held(tmp_path / "cache") == set()


def test_what_a_dead_process_left_half_fetched_is_removed(tmp_path):
    cache = DiskCache(str(tmp_path / "cache"), 10_000)
    (tmp_path / "cache" / f"{'0' * 64}.partial").write_bytes(b"half")
    take(cache, *shard(tmp_path, 1))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_folder_that_cannot_be_made_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-dir .*file/cache"):
        DiskCache(str(tmp_path / "file" / "cache"), 10)
