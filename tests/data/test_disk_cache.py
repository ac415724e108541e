"""The disk cache: fetched once for everybody, never above its limit, never taken for what it is not."""

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.disk_cache import DiskCache
from pipeline.data.manifest import ShardInfo
from pipeline.errors import UserError

SIZE = 20_000


def make_shard(folder, number, size=SIZE):
    """A file of random bytes as a remote shard, and its entry in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}.tar"
    path.write_bytes(data := random.Random(number).randbytes(size))
    digest = hashlib.sha256(data).hexdigest()
    return str(path), ShardInfo(
        name=path.name, index="", num_images=1, num_bytes=size, sha256=digest, index_sha256="0" * 64
    )


@pytest.fixture
def shards(tmp_path):
    return [make_shard(tmp_path / "remote", number) for number in range(8)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def fetched(monkeypatch):
    """The locations that were fetched in this process."""
    locations = []
    read_chunks = storage.read_chunks

    def counted(location, **options):
        locations.append(location)
        yield from read_chunks(location, **options)

    monkeypatch.setattr(storage, "read_chunks", counted)
    return locations


@pytest.fixture
def sizes(monkeypatch, folder):
    """Sizes of the folder after every piece that was fetched."""
    seen = []
    read_chunks = storage.read_chunks

    def watched(location, **options):
        for chunk in read_chunks(location, chunk_bytes=3000, patience_seconds=options["patience_seconds"]):
            yield chunk
            seen.append(size_of(folder))

    monkeypatch.setattr(storage, "read_chunks", watched)
    return seen


def read(cache, shard):
    """The bytes of a shard through the cache; None where the cache does not vouch for them."""
    descriptor = cache.open(*shard, patience_seconds=0.0)
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, 10**7, 0)
    finally:
        os.close(descriptor)


def kept(folder):
    return sorted(path.stem for path in folder.glob("*.tar"))


def digests(*shards):
    return sorted(info.sha256 for _, info in shards)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_is_fetched_once_and_read_again_from_disk(shards, folder, fetched):
    cache = DiskCache(str(folder), 10 * SIZE)
    for _ in range(3):
        assert read(cache, shards[0]) == Path(shards[0][0]).read_bytes()
    assert fetched == [shards[0][0]]
    assert kept(folder) == digests(shards[0])


def test_what_was_fetched_once_is_found_by_others_though_the_source_is_gone(shards, folder):
    data = read(DiskCache(str(folder), 10 * SIZE), shards[0])
    Path(shards[0][0]).unlink()
    assert read(DiskCache(str(folder), 10 * SIZE), shards[0]) == data


def test_equal_shards_of_two_data_sets_are_kept_once(shards, folder, fetched, tmp_path):
    twin = make_shard(tmp_path / "other data set", 0)
    cache = DiskCache(str(folder), 10 * SIZE)
    assert read(cache, shards[0]) == read(cache, twin)
    assert len(fetched) == 1


def test_the_shards_used_longest_ago_are_dropped(shards, folder):
    cache = DiskCache(str(folder), 3 * SIZE)
    for number in (0, 1, 2, 0, 3, 0, 4):
        read(cache, shards[number])
        time.sleep(0.02)  # longer than the clock of any file system ticks
    assert kept(folder) == digests(shards[0], shards[3], shards[4])


def test_the_folder_is_never_above_its_limit(shards, folder, sizes):
    limit = 3 * SIZE + SIZE // 2
    cache = DiskCache(str(folder), limit)
    for shard in shards * 2:
        assert read(cache, shard) is not None
        assert size_of(folder) <= limit
    assert len(sizes) > 100
    assert max(sizes) <= limit


def test_a_source_larger_than_the_manifest_says_does_not_fill_the_disk(shards, folder, sizes):
    location, info = shards[0]
    with open(location, "ab") as file:
        file.write(b"x" * 50 * SIZE)
    assert read(DiskCache(str(folder), 3 * SIZE), (location, info)) is None
    assert max(sizes, default=0) <= 3 * SIZE
    assert size_of(folder) == 0


def test_a_dropped_shard_stays_readable_for_who_has_it_open(shards, folder):
    cache = DiskCache(str(folder), SIZE)
    descriptor = cache.open(*shards[0], patience_seconds=0.0)
    read(cache, shards[1])
    assert kept(folder) == digests(shards[1])
    assert os.pread(descriptor, SIZE, 0) == Path(shards[0][0]).read_bytes()
    os.close(descriptor)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_source_that_is_not_what_the_manifest_says_is_not_kept(shards, folder, change):
    path = Path(shards[0][0])
    good = path.read_bytes()
    path.write_bytes(change(good))
    cache = DiskCache(str(folder), 10 * SIZE)
    assert read(cache, shards[0]) is None
    assert size_of(folder) == 0
    path.write_bytes(good)
    assert read(cache, shards[0]) == good


def test_a_missing_source_is_told_apart_and_leaves_nothing(shards, folder):
    Path(shards[0][0]).unlink()
    with pytest.raises(FileNotFoundError):
        read(DiskCache(str(folder), 10 * SIZE), shards[0])
    assert size_of(folder) == 0


def test_storage_that_breaks_off_leaves_nothing(shards, folder, monkeypatch):
    def broken(location, **options):
        yield b"some bytes"
        raise KeyboardInterrupt

    cache = DiskCache(str(folder), 10 * SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_chunks", broken)
        with pytest.raises(KeyboardInterrupt):
            read(cache, shards[0])
    assert size_of(folder) == 0
    assert read(cache, shards[0]) is not None


def test_a_folder_that_cannot_be_written_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/no-folder"):
        with pytest.raises(UserError, match=rf"^--cache-dir {folder}: .*; give a folder that can be written$"):
            DiskCache(folder, SIZE)


def test_the_folder_may_be_given_with_a_tilde(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    read(DiskCache("~/cache", SIZE), shards[0])
    assert kept(tmp_path / "cache") == digests(shards[0])


def test_what_a_dead_process_left_half_fetched_is_removed(shards, folder):
    cache = DiskCache(str(folder), 10 * SIZE)
    left_behind = folder / f"{shards[1][1].sha256}.partial"
    left_behind.write_bytes(b"x" * 3 * SIZE)
    read(cache, shards[0])
    assert not left_behind.exists()
    left_behind.write_bytes(b"x" * 3 * SIZE)
    assert read(cache, shards[1]) == Path(shards[1][0]).read_bytes()
    assert not left_behind.exists()


def test_what_a_dead_process_left_of_the_very_shard_drops_no_other(shards, folder):
    cache = DiskCache(str(folder), 2 * SIZE)
    read(cache, shards[0])
    (folder / f"{shards[1][1].sha256}.partial").write_bytes(b"x" * SIZE)
    read(cache, shards[1])
    assert kept(folder) == digests(shards[0], shards[1])


def test_what_a_living_process_is_fetching_is_left_alone(shards, folder):
    cache = DiskCache(str(folder), 10 * SIZE)
    other = next(shard for shard in shards[1:] if shard[1].sha256[:2] != shards[0][1].sha256[:2])
    partial = folder / f"{other[1].sha256}.partial"
    partial.write_bytes(b"half")
    with open(folder / f"lock-{other[1].sha256[:2]}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read(cache, shards[0])
        assert partial.read_bytes() == b"half"


def test_readers_that_fetch_and_drop_at_the_same_time_all_get_their_bytes(tmp_path, folder):
    shards = [make_shard(tmp_path / "remote", number, size=2000) for number in range(40)]
    wrong = []

    def work(seed):
        cache, chosen = DiskCache(str(folder), 12 * 2000), random.Random(seed)
        for _ in range(200):
            location, info = chosen.choice(shards)
            try:
                descriptor = cache.open(location, info, patience_seconds=0.0)
            except Exception as error:
                wrong.append(error)
                continue
            # None: dropped by another thread before it could be opened; the caller then reads the source itself.
            if descriptor is not None:
                if hashlib.sha256(os.pread(descriptor, 10**6, 0)).hexdigest() != info.sha256:
                    wrong.append(location)
                os.close(descriptor)

    # Threads stand for processes: the locks are those of open files.
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert size_of(folder) <= 12 * 2000


def test_a_folder_that_is_deleted_meanwhile_is_not_taken_for_a_missing_shard(shards, folder):
    cache = DiskCache(str(folder), 10 * SIZE)
    read(cache, shards[0])
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    try:
        found = read(cache, shards[1])
    except FileNotFoundError as error:
        found = error
    except RuntimeError:
        return
    assert found == Path(shards[1][0]).read_bytes()


def _fetch_slowly(folder, shard, start, answers):
    """Opens a shard whose source takes its time and leaves a mark for each time that it is read."""
    read_chunks = storage.read_chunks

    def slow(location, **options):
        descriptor = os.open(f"{folder}.fetches", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b"x")
        os.close(descriptor)
        time.sleep(0.3)
        yield from read_chunks(location, **options)

    storage.read_chunks = slow
    cache = DiskCache(str(folder), 10 * SIZE)
    start.wait()
    descriptor = cache.open(*shard, patience_seconds=0.0)
    answers.put((os.fstat(descriptor).st_ino, hashlib.sha256(os.pread(descriptor, SIZE, 0)).hexdigest()))


def _fetch_for_ever(folder, shard, started):
    def endless(location, **options):
        yield b"x"
        started.set()
        while True:
            time.sleep(1)
            yield b""

    storage.read_chunks = endless
    DiskCache(str(folder), 10 * SIZE).open(*shard, patience_seconds=0.0)


@pytest.mark.slow
def test_four_processes_that_ask_at_once_fetch_once(shards, folder):
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    arguments = (folder, shards[0], start, answers)
    processes = [context.Process(target=_fetch_slowly, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    found = {answers.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(timeout=20)
    assert {digest for _, digest in found} == {shards[0][1].sha256}
    assert len(found) == 1
    assert Path(f"{folder}.fetches").read_bytes() == b"x"
    assert kept(folder) == digests(shards[0])
    assert list(folder.glob("*.partial")) == []


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_fetches_does_not_keep_the_others_waiting(shards, folder):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_fetch_for_ever, args=(folder, shards[0], started), daemon=True)
    process.start()
    assert started.wait(20)
    assert len(list(folder.glob("*.partial"))) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert read(DiskCache(str(folder), 10 * SIZE), shards[0]) == Path(shards[0][0]).read_bytes()
    assert list(folder.glob("*.partial")) == []
