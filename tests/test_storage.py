"""Bytes on local paths and on a real S3 server, behind the same functions."""

import dataclasses
import io
import os
import signal
import stat
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from servers import Credentials, S3Server, forget_s3_client

from pipeline import storage
from pipeline.errors import UserError, WorldError
from pipeline.storage import s3_client


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


def test_a_removed_file_is_gone_and_removing_it_again_changes_nothing(root):
    location = storage.join(root, "folder", "file")
    storage.write_bytes(location, b"x")
    storage.remove(location)
    storage.remove(location)
    assert not storage.exists(location)


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


def test_a_link_to_nowhere_is_no_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert list(storage.list_files(str(tmp_path))) == [str(tmp_path / "file")]


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


@pytest.mark.parametrize("name", ["with space", "plus+and%41", "ünïcode", "a=b&c", "what?", "#1"])
def test_a_name_with_odd_characters_is_kept_as_it_is(root, name):
    location = storage.join(root, name)
    storage.write_bytes(location, b"x")
    assert storage.read_bytes(location) == b"x"
    assert list(storage.list_files(root)) == [location]


@pytest.mark.parametrize("chunk_bytes", [1, 3, 10, 100])
def test_the_pieces_of_a_file_are_the_file(root, chunk_bytes):
    location = storage.join(root, "file")
    storage.write_bytes(location, b"0123456789")
    chunks = list(storage.read_chunks(location, chunk_bytes=chunk_bytes))
    assert b"".join(chunks) == b"0123456789"
    assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_bytes}


def test_an_empty_file_has_no_pieces(root):
    storage.write_bytes(storage.join(root, "empty"), b"")
    assert list(storage.read_chunks(storage.join(root, "empty"))) == []


def test_pieces_need_not_be_read_to_the_end(root):
    location = storage.join(root, "file")
    storage.write_bytes(location, bytes(9 * 2**20))
    chunks = storage.read_chunks(location, chunk_bytes=1000)
    assert next(chunks) == bytes(1000)
    chunks.close()
    assert storage.num_bytes(location) == 9 * 2**20


@pytest.mark.parametrize("start", [10, 11, 5000])
def test_past_the_end_of_a_file_there_are_no_bytes(root, start):
    location = storage.join(root, "file")
    storage.write_bytes(location, b"0123456789")
    assert storage.read_range(location, start, 5) == b""


def test_a_range_of_no_bytes_is_empty(root):
    location = storage.join(root, "file")
    storage.write_bytes(location, b"0123456789")
    assert storage.read_range(location, 3, 0) == b""


@pytest.mark.parametrize("size", [0, 1, 12345])
def test_the_size_of_a_file_is_known_without_reading_it(root, size):
    storage.write_bytes(storage.join(root, "file"), bytes(size))
    assert storage.num_bytes(storage.join(root, "file")) == size


def test_a_listing_tells_the_sizes(root):
    sizes = {"a": 0, "folder/b": 5, "folder/c": 12345}
    for name, size in sizes.items():
        storage.write_bytes(storage.join(root, name), bytes(size))
    listed = {entry.location: entry.num_bytes for entry in storage.list_entries(root)}
    assert listed == {storage.join(root, name): size for name, size in sizes.items()}
    assert list(listed) == list(storage.list_files(root))


def test_only_s3_tags_what_it_lists(root):
    for name in ("a", "b"):
        storage.write_bytes(storage.join(root, name), name.encode())
    tags = [entry.etag for entry in storage.list_entries(root)]
    assert len(set(tags)) == 2 if storage.is_remote(root) else tags == ["", ""]


def test_a_file_entry_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        storage.FileEntry("/x", 1, "").num_bytes = 2


@pytest.mark.parametrize("ask", [storage.num_bytes, storage.open_binary, lambda x: list(storage.read_chunks(x))])
def test_sizes_pieces_and_file_objects_of_a_missing_file_are_file_not_found(root, ask):
    with pytest.raises(FileNotFoundError, match="missing"):
        ask(storage.join(root, "missing"))


def test_a_folder_has_no_size(root):
    storage.write_bytes(storage.join(root, "folder", "file"), b"x")
    with pytest.raises(FileNotFoundError, match="folder"):
        storage.num_bytes(storage.join(root, "folder"))


# File objects, on both kinds of storage.


def test_a_file_object_reads_seeks_and_tells(root):
    data = os.urandom(3 * 2**20)
    storage.write_bytes(storage.join(root, "file"), data)
    with storage.open_binary(storage.join(root, "file")) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-7, io.SEEK_END) == len(data) - 7
        assert file.read() == data[-7:]
        assert file.read(1) == b""
        assert file.seek(2**20 - 3) == file.tell()
        assert file.read(2**20 + 9) == data[2**20 - 3 : 2**21 + 6]
        assert file.seek(len(data) + 5) == len(data) + 5
        assert file.read(1) == b""
        file.seek(0)
        assert file.read() == data


def test_a_file_object_is_for_reading_only(root):
    storage.write_bytes(storage.join(root, "file"), b"x")
    with storage.open_binary(storage.join(root, "file")) as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()


def test_a_zip_archive_is_read_in_place(root):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.bin", bytes(2**21))
        file.writestr("b.txt", "b")
    storage.write_bytes(storage.join(root, "x.zip"), archive.getvalue())
    with storage.open_binary(storage.join(root, "x.zip")) as file, zipfile.ZipFile(file) as opened:
        assert opened.namelist() == ["a.bin", "b.txt"]
        assert opened.read("b.txt") == b"b"
        assert opened.read("a.bin") == bytes(2**21)


@pytest.mark.parametrize("mode", ["r:", "r:gz"])
def test_a_tar_archive_is_read_in_place(root, mode):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode.replace("r", "w")) as file:
        for name, content in (("a", bytes(2**21)), ("b", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    storage.write_bytes(storage.join(root, "x.tar"), archive.getvalue())
    with storage.open_binary(storage.join(root, "x.tar")) as file, tarfile.open(fileobj=file, mode=mode) as opened:
        assert {member.name: member.size for member in opened} == {"a": 2**21, "b": 1}
        assert opened.extractfile("b").read() == b"b"


def test_the_header_of_a_numpy_array_is_read_alone(root):
    array = io.BytesIO()
    np.save(array, np.zeros((5, 4), dtype=np.uint8))
    storage.write_bytes(storage.join(root, "x.npy"), array.getvalue())
    with storage.open_binary(storage.join(root, "x.npy")) as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((5, 4), False, np.dtype(np.uint8))
        assert file.read() == bytes(20)


def test_a_parquet_file_is_read_in_place(root):
    table = pa.table({"label": list(range(1000))})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, row_group_size=100)
    storage.write_bytes(storage.join(root, "x.parquet"), sink.getvalue())
    with storage.open_binary(storage.join(root, "x.parquet")) as file:
        opened = pyarrow.parquet.ParquetFile(pa.PythonFile(file, mode="r"))
        assert opened.num_row_groups == 10
        assert opened.read_row_group(7)["label"].to_pylist() == list(range(700, 800))


def test_seeking_before_the_start_is_an_error_of_the_file(bucket):
    storage.write_bytes(f"{bucket}/x", b"x")
    with storage.open_binary(f"{bucket}/x") as file, pytest.raises(ValueError, match=f"{bucket}/x: cannot seek to -1"):
        file.seek(-1)


def test_an_open_object_that_is_replaced_is_refused_instead_of_mixed(bucket):
    storage.write_bytes(f"{bucket}/x", bytes(2**21))
    with storage.open_binary(f"{bucket}/x") as file:
        file.read(1)
        storage.write_bytes(f"{bucket}/x", b"1" * 2**21)
        with pytest.raises(WorldError, match=f"^{bucket}/x changed while it was read; read it again$"):
            file.read()


# Patterns, on both kinds of storage.

_TREE = ["a/train-0.tar", "a/train-1.tar", "a/val-0.tar", "a/deep/train-2.tar", "b/train-0.tar", "b/.train-9.tar", "c"]


@pytest.fixture
def tree(root: str) -> str:
    for name in _TREE:
        storage.write_bytes(storage.join(root, name), b"x")
    return root


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/train-*.tar", ["a/train-0.tar", "a/train-1.tar"]),
        ("a/train-?.tar", ["a/train-0.tar", "a/train-1.tar"]),
        ("a/train-[1-9].tar", ["a/train-1.tar"]),
        ("a/train-[!1].tar", ["a/train-0.tar"]),
        ("?/train-0.tar", ["a/train-0.tar", "b/train-0.tar"]),
        ("*/*/*", ["a/deep/train-2.tar"]),
        ("*", ["c"]),
        ("{a,b}/*-0.tar", ["a/train-0.tar", "a/val-0.tar", "b/train-0.tar"]),
        ("a/{*,train-0}.tar", ["a/train-0.tar", "a/train-1.tar", "a/val-0.tar"]),
        ("b/*", ["b/train-0.tar"]),
        ("b/.*", ["b/.train-9.tar"]),
        ("nowhere/*", []),
        ("c/*", []),
        ("a/*.zip", []),
    ],
)
def test_a_pattern_stands_for_the_files_that_match_it(tree, pattern, expected):
    assert storage.expand(storage.join(tree, pattern)) == [storage.join(tree, name) for name in expected]


@pytest.mark.parametrize("root", ["/data", "s3://bucket/data"])
def test_braces_name_every_shard_whether_it_exists_or_not(root):
    expected = [f"{root}/train-{index:05d}.tar" for index in range(98, 113)]
    assert storage.expand(f"{root}/train-{{00098..00112}}.tar") == expected


@pytest.mark.parametrize("root", ["/data", "s3://bucket/data"])
def test_a_name_without_pattern_stands_for_itself(root):
    assert storage.expand(f"{root}/x.tar") == [f"{root}/x.tar"]


def test_a_pattern_names_no_file_twice():
    assert storage.expand("/data/{b,a,b}") == ["/data/a", "/data/b"]


def test_braces_that_do_not_pair_up_are_refused():
    with pytest.raises(UserError, match="its braces do not pair up"):
        storage.expand("/data/train-{0..9.tar")


def test_a_wildcard_in_the_bucket_s_name_is_refused():
    with pytest.raises(UserError, match="the bucket's name may not have wildcards"):
        storage.expand("s3://bucket-*/x")


def test_a_relative_pattern_starts_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.tar").touch()
    assert storage.expand("*.tar") == ["x.tar"]


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
    assert "wrong" not in one_line(error, f"S3 refused {bucket}/x: SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")
    assert time.monotonic() - start < 5


def test_an_unknown_user_is_refused_in_one_line(bucket, s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(Credentials(access_key="nobody", secret_key="x" * 20)))
    with pytest.raises(WorldError) as error:
        list(storage.list_files(bucket))
    one_line(error, f"S3 refused {bucket}: InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID")


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
    one_line(error, f"cannot reach {bucket}/x: ", "credentials", "set AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("ask", [storage.read_bytes, storage.num_bytes, storage.open_binary])
def test_a_missing_bucket_is_told_apart_from_a_missing_file(bucket, ask):
    with pytest.raises(WorldError) as error:
        ask("s3://no-such-bucket/x")
    one_line(error, "S3 refused s3://no-such-bucket/x: NoSuchBucket", "make the bucket", "AWS_ENDPOINT_URL")


def test_writing_into_a_missing_bucket_is_refused(s3: S3Server, monkeypatch):
    use(monkeypatch, s3.environment(s3.reader))
    with pytest.raises(WorldError) as error:
        storage.write_bytes("s3://no-such-bucket/x", b"x")
    one_line(error, "S3 refused s3://no-such-bucket/x: ")


NOBODY = S3Server(
    endpoint="http://127.0.0.1:9",
    admin=Credentials(access_key="a", secret_key="b"),
    reader=Credentials(access_key="a", secret_key="b"),
)


def test_an_endpoint_where_nobody_listens_is_one_clear_line_and_soon(monkeypatch):
    use(monkeypatch, NOBODY.environment())
    start = time.monotonic()
    with pytest.raises(storage.UnreachableError) as error:
        storage.read_bytes("s3://bucket/x")
    one_line(error, "cannot reach s3://bucket/x: ", "http://127.0.0.1:9", "check AWS_ENDPOINT_URL")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "ask",
    [
        storage.exists,
        storage.num_bytes,
        storage.open_binary,
        lambda location: storage.read_range(location, 0, 1),
        lambda location: list(storage.read_chunks(location)),
        lambda location: list(storage.list_files(location)),
        lambda location: storage.expand(f"{location}/*"),
        lambda location: storage.write_bytes(location, b"x"),
    ],
)
def test_every_function_says_when_storage_is_unreachable(ask, monkeypatch):
    use(monkeypatch, NOBODY.environment() | {"AWS_MAX_ATTEMPTS": "1"})
    with pytest.raises(storage.UnreachableError) as error:
        ask("s3://bucket/x")
    one_line(error, "cannot reach s3://bucket/x: ")


def test_a_password_in_the_endpoint_is_not_shown(monkeypatch):
    endpoint = {"AWS_ENDPOINT_URL": "http://user:hunter2@127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    use(monkeypatch, NOBODY.environment() | endpoint)
    with pytest.raises(WorldError) as error:
        storage.read_bytes("s3://bucket/x")
    assert "hunter2" not in one_line(error, "cannot reach s3://bucket/x: ", "//***@127.0.0.1:9")


def test_a_user_who_may_only_read_reads_and_is_refused_on_write(bucket, s3: S3Server, monkeypatch):
    storage.write_bytes(f"{bucket}/x", b"old")
    use(monkeypatch, s3.environment(s3.reader))
    assert storage.read_bytes(f"{bucket}/x") == b"old"
    with pytest.raises(WorldError) as error:
        storage.write_bytes(f"{bucket}/x", b"new")
    one_line(error, f"S3 refused {bucket}/x: AccessDenied")
    assert storage.read_bytes(f"{bucket}/x") == b"old"


def test_an_empty_object_that_marks_a_folder_is_no_file(bucket):
    storage.write_bytes(f"{bucket}/folder/", b"")
    storage.write_bytes(f"{bucket}/folder/file", b"x")
    assert list(storage.list_files(f"{bucket}/folder")) == [f"{bucket}/folder/file"]
    assert list(storage.list_files(bucket)) == [f"{bucket}/folder/file"]


# The client.


def test_a_process_makes_its_own_client_after_a_fork(bucket):
    assert storage._s3() is storage._s3()
    assert storage._s3_of_process(os.getpid() + 1) is not storage._s3()


def test_a_fork_while_another_thread_makes_the_client_does_not_hang_the_child(bucket):
    with s3_client._creating:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if storage._s3() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_ask_at_once_share_one_client(bucket):
    forget_s3_client()
    barrier = Barrier(8)

    def ask(_: int) -> int:
        barrier.wait()
        return id(storage._s3())

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert storage._s3().meta.config.max_pool_connections == 32


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, **environment: str) -> None:
    """Gives the test AWS settings: a config file and some environment."""
    (folder / "aws-config").write_text(text)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    use(monkeypatch, keys | {"AWS_CONFIG_FILE": str(folder / "aws-config")} | environment)


def test_retries_are_ours_where_the_user_said_nothing(monkeypatch, tmp_path):
    configure(monkeypatch, tmp_path, "")
    assert storage._s3().meta.config.retries == {"mode": "adaptive", "total_max_attempts": 5}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("[default]\nmax_attempts = 9\n", {}, ("total_max_attempts", 9)),
        ("[default]\nretry_mode = legacy\n", {}, ("mode", "legacy")),
        ("", {"AWS_MAX_ATTEMPTS": "2"}, ("total_max_attempts", 2)),
        ("", {"AWS_RETRY_MODE": "standard"}, ("mode", "standard")),
    ],
)
def test_retries_are_the_user_s_where_they_are_given(monkeypatch, tmp_path, text, environment, expected):
    configure(monkeypatch, tmp_path, text, **environment)
    retries = storage._s3().meta.config.retries
    assert retries[expected[0]] == expected[1]
    assert retries["mode"] != "adaptive"


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
        ("", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_ENDPOINT_URL": "http://127.0.0.1:8"}),
        ("[default]\nendpoint_url = http://127.0.0.1:9\n", {}),
        (
            "[profile lab]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = http://127.0.0.1:9\n",
            {"AWS_PROFILE": "lab"},
        ),
    ],
)
def test_the_endpoint_may_stand_wherever_aws_lets_it(monkeypatch, tmp_path, text, environment):
    configure(monkeypatch, tmp_path, text, **environment)
    assert storage._s3().meta.endpoint_url == "http://127.0.0.1:9"
    assert storage._s3().meta.config.s3["addressing_style"] == "path"


def test_amazon_s_own_endpoint_keeps_amazon_s_addressing(monkeypatch, tmp_path):
    configure(monkeypatch, tmp_path, "")
    assert storage._s3().meta.endpoint_url == "https://s3.amazonaws.com"
    assert not (storage._s3().meta.config.s3 or {}).get("addressing_style")


def test_the_user_s_addressing_style_is_kept(monkeypatch, tmp_path):
    text = "[default]\nendpoint_url = http://localhost:9\ns3 =\n  addressing_style = virtual\n"
    configure(monkeypatch, tmp_path, text)
    assert storage._s3().meta.config.s3["addressing_style"] == "virtual"


def test_a_profile_of_the_files_is_enough_to_read(bucket, s3: S3Server, monkeypatch, tmp_path):
    storage.write_bytes(f"{bucket}/x", b"x")
    for name in s3.environment():
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    keys = f"aws_access_key_id = {s3.reader.access_key}\naws_secret_access_key = {s3.reader.secret_key}\n"
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    use(monkeypatch, {name: str(tmp_path / file) for name, file in files.items()} | {"AWS_PROFILE": "lab"})
    assert storage.read_bytes(f"{bucket}/x") == b"x"


def test_a_profile_that_is_not_there_is_one_clear_line(monkeypatch, tmp_path):
    configure(monkeypatch, tmp_path, "", AWS_PROFILE="nowhere")
    with pytest.raises(WorldError) as error:
        storage.read_bytes("s3://bucket/x")
    one_line(error, "cannot reach s3://bucket/x: ", "nowhere", "check AWS_PROFILE")


@pytest.mark.parametrize("setting", [{"AWS_MAX_ATTEMPTS": "many"}, {"AWS_ENDPOINT_URL": "localhost 9000"}])
def test_settings_that_aws_cannot_read_are_the_user_s_error(monkeypatch, tmp_path, setting):
    configure(monkeypatch, tmp_path, "", **setting)
    with pytest.raises(UserError, match=r"^the AWS settings are not valid: "):
        storage.read_bytes("s3://bucket/x")


def test_the_default_session_of_boto3_is_left_to_others(bucket):
    assert storage._s3()
    assert boto3.DEFAULT_SESSION is None
