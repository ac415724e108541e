"""Bytes on local paths and on a real S3 server, behind the same functions."""

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Credentials, S3Server, forget_s3_client

from pipeline import storage
from pipeline.errors import UserError, WorldError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write to: a folder, then a bucket."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("bucket")


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_s3_client()


def one_line(error: pytest.ExceptionInfo[WorldError], *words: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not [word for word in words if word not in text]
    return text


# The contract, on both kinds of storage.


def test_what_was_written_is_read_back(root):
    location = storage.join(root, "folder", "file.bin")
    storage.write_bytes(location, bytes(range(256)))
    assert storage.read_bytes(location) == bytes(range(256))


def test_an_empty_file_is_a_file(root):
    location = storage.join(root, "empty")
    storage.write_bytes(location, b"")
    assert storage.exists(location)
    assert storage.read_bytes(location) == b""


def test_writing_again_replaces_the_bytes(root):
    location = storage.join(root, "file")
    storage.write_bytes(location, b"a long first version")
    storage.write_bytes(location, b"second")
    assert storage.read_bytes(location) == b"second"
    assert list(storage.list_files(root)) == [location]


def test_megabytes_survive(root):
    data = os.urandom(9 * 2**20)
    location = storage.join(root, "shard.tar")
    storage.write_bytes(location, data)
    assert storage.sha256_hex(storage.read_bytes(location)) == storage.sha256_hex(data)


@pytest.mark.parametrize(
    ("start", "num_bytes", "expected"),
    [(0, 4, b"0123"), (4, 3, b"456"), (8, 100, b"89"), (9, 1, b"9")],
)
def test_a_range_is_read_without_the_rest(root, start, num_bytes, expected):
    location = storage.join(root, "file")
    storage.write_bytes(location, b"0123456789")
    assert storage.read_range(location, start, num_bytes) == expected


def test_files_are_listed_at_any_depth_sorted_by_name(root):
    names = ["b/2", "a/deep/er/1", "b/10", "c"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")
    assert list(storage.list_files(root)) == [storage.join(root, name) for name in sorted(names)]


def test_a_folder_s_listing_leaves_out_its_neighbours_of_like_name(root):
    for name in ("run/1", "run-2/1", "runner"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert list(storage.list_files(storage.join(root, "run"))) == [storage.join(root, "run/1")]


def test_more_files_than_a_page_holds_are_all_listed(root, monkeypatch):
    names = [f"{index:04d}" for index in range(12)]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"")
    if storage.is_remote(root):
        paginator = storage._s3().get_paginator
        monkeypatch.setattr(storage._s3(), "get_paginator", lambda name: _PagesOfFive(paginator(name)))
    assert list(storage.list_files(root)) == [storage.join(root, name) for name in names]


class _PagesOfFive:
    """A paginator whose pages hold 5 keys instead of 1,000."""

    def __init__(self, paginator) -> None:
        self._paginator = paginator

    def paginate(self, **arguments):
        return self._paginator.paginate(**arguments, PaginationConfig={"PageSize": 5})


def test_a_folder_that_is_not_there_lists_nothing(root):
    assert list(storage.list_files(storage.join(root, "nowhere"))) == []


def test_a_file_exists_and_a_folder_does_not(root):
    storage.write_bytes(storage.join(root, "folder", "file"), b"x")
    assert storage.exists(storage.join(root, "folder", "file"))
    assert not storage.exists(storage.join(root, "folder"))
    assert not storage.exists(storage.join(root, "missing"))


def test_a_missing_file_is_file_not_found(root):
    missing = storage.join(root, "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_bytes(missing)
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_range(missing, 0, 10)


@pytest.mark.parametrize("name", ["with space", "plus+and%41", "ünïcode", "a=b&c"])
def test_a_name_with_odd_characters_is_kept_as_it_is(root, name):
    location = storage.join(root, name)
    storage.write_bytes(location, b"x")
    assert storage.read_bytes(location) == b"x"
    assert list(storage.list_files(root)) == [location]


# Locations.


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_HOME", str(tmp_path / "x"))
    assert storage.home() == str(tmp_path / "x")


def test_home_may_be_a_bucket(monkeypatch):
    monkeypatch.setenv("DDPM_HOME", "s3://bucket/prefix/")
    assert storage.home() == "s3://bucket/prefix"


def test_home_is_absolute_even_where_the_environment_is_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HOME", "relative")
    assert storage.home() == str(tmp_path / "relative")


def test_home_knows_the_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DDPM_HOME", "~/ddpm")
    assert storage.home() == str(tmp_path / "ddpm")


def test_home_is_the_user_s_data_folder_when_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("DDPM_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.home() == str(tmp_path / ".local/share/ddpm-ray")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert storage.home() == str(tmp_path / "xdg/ddpm-ray")


def test_home_with_another_scheme_is_refused(monkeypatch):
    monkeypatch.setenv("DDPM_HOME", "gs://bucket")
    with pytest.raises(UserError, match="scheme gs:// is not supported"):
        storage.home()


def test_a_bare_name_lies_under_home_and_never_under_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("digits", "data") == f"{storage.home()}/data/digits"


def test_a_bare_name_lies_in_the_bucket_when_home_is_one(monkeypatch):
    monkeypatch.setenv("DDPM_HOME", "s3://bucket/prefix")
    assert storage.resolve("digits", "data") == "s3://bucket/prefix/data/digits"


@pytest.mark.parametrize("location", ["/data/x", "s3://bucket/x"])
def test_an_absolute_location_stays(location):
    assert storage.resolve(location, "data") == location


def test_locations_are_joined_by_single_slashes():
    assert storage.join("/a/", "b", "/c/") == "/a/b/c"
    assert storage.join("s3://bucket/", "b/c", "d") == "s3://bucket/b/c/d"


@pytest.mark.parametrize(("location", "remote"), [("s3://b/x", True), ("/x", False), ("x", False), ("s3/x", False)])
def test_only_s3_uris_are_remote(location, remote):
    assert storage.is_remote(location) is remote


@pytest.mark.parametrize("location", ["gs://bucket/x", "file:///x", "https://host/x"])
def test_another_scheme_is_refused_by_name(location):
    with pytest.raises(UserError, match=f"^'{location}': scheme .* is not supported; give a local path or s3://"):
        storage.is_remote(location)


def test_a_uri_without_a_bucket_is_refused():
    with pytest.raises(UserError, match="'s3:///key' names no bucket"):
        storage.read_bytes("s3:///key")


def test_sha256_is_that_of_the_standard():
    assert storage.sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Local writes.


def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file(tmp_path, monkeypatch):
    location = tmp_path / "file"
    storage.write_bytes(str(location), b"old")

    def crash(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(WorldError) as error:
        storage.write_bytes(str(location), b"new")
    assert str(error.value) == f"cannot write {location}: No space left on device"
    assert location.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_what_a_killed_writer_left_behind_is_not_listed(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Like SIGKILL: no handler of OSError runs."""

    def die(source: str, target: str) -> None:
        raise Killed

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        storage.write_bytes(str(tmp_path / "file"), b"new")
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".partial"]
    assert list(storage.list_files(str(tmp_path))) == []
    assert not storage.exists(str(tmp_path / "file"))


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WorldError) as error:
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")
    one_line(error, f"cannot write {tmp_path}/file/below: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_one_clear_line(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(WorldError, match=r"Permission denied$"):
        storage.write_bytes(str(folder / "file"), b"x")


def test_a_read_only_file_system_is_one_clear_line():
    with pytest.raises(WorldError) as error:
        storage.write_bytes("/proc/file", b"x")
    one_line(error, "cannot write /proc/file: ")


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        storage.write_bytes(str(tmp_path / "file"), b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_reader_sees_the_old_bytes_or_the_new_ones_and_never_a_part(tmp_path):
    location, versions = str(tmp_path / "file"), [bytes([value]) * 200_000 for value in (1, 2)]
    storage.write_bytes(location, versions[0])
    with ThreadPoolExecutor(max_workers=1) as pool:
        writer = pool.submit(lambda: [storage.write_bytes(location, versions[index % 2]) for index in range(100)])
        seen = []
        while not writer.done():
            seen.append(storage.read_bytes(location))
        writer.result()
    assert len(seen) > 10
    assert set(seen) <= set(versions)


# S3's refusals.


def test_a_wrong_secret_is_refused_in_one_line_and_soon(bucket, s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(Credentials(access_key=s3.admin.access_key, secret_key="wrong")))
    start = time.monotonic()
    with pytest.raises(WorldError) as error:
        storage.read_bytes(f"{bucket}/x")
    one_line(error, f"S3 refused {bucket}/x: SignatureDoesNotMatch")
    assert time.monotonic() - start < 5


def test_an_unknown_user_is_refused_in_one_line(bucket, s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(Credentials(access_key="nobody", secret_key="x" * 20)))
    with pytest.raises(WorldError) as error:
        list(storage.list_files(bucket))
    one_line(error, f"S3 refused {bucket}: InvalidAccessKeyId")


def test_wrong_credentials_are_never_mistaken_for_a_missing_file(bucket, s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(Credentials(access_key=s3.admin.access_key, secret_key="wrong")))
    with pytest.raises(WorldError):
        storage.exists(f"{bucket}/x")


def test_missing_credentials_are_one_clear_line(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_s3_client()
    with pytest.raises(WorldError) as error:
        storage.read_bytes(f"{bucket}/x")
    one_line(error, f"cannot reach {bucket}/x: ", "credentials")


def test_a_missing_bucket_is_told_apart_from_a_missing_file(bucket):
    with pytest.raises(WorldError) as error:
        storage.read_bytes("s3://no-such-bucket/x")
    one_line(error, "S3 refused s3://no-such-bucket/x: NoSuchBucket")


def test_writing_into_a_missing_bucket_is_refused(s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(s3.reader))
    with pytest.raises(WorldError) as error:
        storage.write_bytes("s3://no-such-bucket/x", b"x")
    one_line(error, "S3 refused s3://no-such-bucket/x: ")


def test_an_endpoint_where_nobody_listens_is_one_clear_line_and_soon(monkeypatch):
    keys = Credentials(access_key="a", secret_key="b")
    use(monkeypatch, S3Server(endpoint="http://127.0.0.1:9", admin=keys, reader=keys).environment())
    start = time.monotonic()
    with pytest.raises(WorldError) as error:
        storage.read_bytes("s3://bucket/x")
    one_line(error, "cannot reach s3://bucket/x: ", "http://127.0.0.1:9")
    assert time.monotonic() - start < 20


def test_a_user_who_may_only_read_reads_and_is_refused_on_write(bucket, s3: S3Server, monkeypatch):
    storage.write_bytes(f"{bucket}/x", b"old")
    use(monkeypatch, s3.environment(s3.reader))
    assert storage.read_bytes(f"{bucket}/x") == b"old"
    with pytest.raises(WorldError) as error:
        storage.write_bytes(f"{bucket}/x", b"new")
    one_line(error, f"S3 refused {bucket}/x: AccessDenied")
    assert storage.read_bytes(f"{bucket}/x") == b"old"


def test_a_process_makes_its_own_client_after_a_fork(bucket):
    assert storage._s3() is storage._s3()
    assert storage._s3_of_process(os.getpid() + 1) is not storage._s3()


def test_an_empty_object_that_marks_a_folder_is_no_file(bucket):
    storage.write_bytes(f"{bucket}/folder/", b"")
    storage.write_bytes(f"{bucket}/folder/file", b"x")
    assert list(storage.list_files(f"{bucket}/folder")) == [f"{bucket}/folder/file"]
    assert list(storage.list_files(bucket)) == [f"{bucket}/folder/file"]
