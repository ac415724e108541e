"""Archives: tar and zip files of images, read in place."""

import io
import pickle
import tarfile
import zipfile

import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.sources import members, open_source
from pipeline.errors import UserError

COLOURS = {"set/cat/1.png": 10, "set/cat/2.png": 20, "set/dog/1.png": 30, "set/dog/2.png": 40}
SUFFIXES = [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"]


def png(value, size=4):
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def images(colours=COLOURS):
    return {name: png(value) for name, value in colours.items()}


def pack(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(path, **options):
    return open_source(f"archive:{path}", **{"image_size": 4, "image_channels": 1, **options})


def values(source, start=0, stop=None):
    stop = len(source) if stop is None else stop
    return [int(each.pixels[0, 0, 0]) for each in source.samples(start, source.read(start, stop))]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_gives_its_images_in_its_order_with_the_folder_below_the_common_one_as_class(tmp_path, suffix):
    source = opened(pack(tmp_path / f"set{suffix}", images()))
    assert source.class_names == ("cat", "dog")
    samples = list(source.samples(0, source.read(0, 4)))
    assert [(each.key[-1], int(each.pixels[0, 0, 0]), each.label) for each in samples] == [
        ("0", 10, 0),
        ("1", 20, 0),
        ("2", 30, 1),
        ("3", 40, 1),
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_compressed_tars_must_be_read_in_the_driver(tmp_path, suffix):
    assert opened(pack(tmp_path / f"set{suffix}", images())).reads_in_driver == (suffix not in (".tar", ".zip"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ranges_may_leave_gaps_and_may_go_back(tmp_path, suffix):
    source = opened(pack(tmp_path / f"set{suffix}", images()))
    assert values(source, 1, 2) == [20]
    assert values(source, 3, 4) == [40]
    assert values(source, 0, 2) == [10, 20]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_source_that_has_begun_to_read_survives_pickling(tmp_path, suffix):
    source = opened(pack(tmp_path / f"set{suffix}", images()))
    assert values(source, 1, 2) == [20]
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert values(copy) == [10, 20, 30, 40]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hidden_files_and_other_files_in_an_archive_are_not_images(tmp_path, suffix):
    junk = {"set/readme.txt": b"x", "__MACOSX/set/cat/._1.png": b"x", "set/cat/.hidden.png": b"x"}
    assert len(opened(pack(tmp_path / f"set{suffix}", junk | images()))) == 4


def test_without_a_common_folder_the_first_folder_is_the_class(tmp_path):
    source = opened(pack(tmp_path / "a.zip", images({"./b/1.png": 1, "a/2.png": 2})))
    assert source.class_names == ("a", "b")
    assert [each.label for each in source.samples(0, source.read(0, 2))] == [1, 0]


def test_several_folders_around_everything_are_no_class(tmp_path):
    source = opened(pack(tmp_path / "a.zip", images({"photos/train/b/1.png": 1, "photos/train/a/2.png": 2})))
    assert source.class_names == ("a", "b")


def test_images_of_one_folder_have_no_class(tmp_path):
    assert opened(pack(tmp_path / "a.tar", images({"set/1.png": 1, "set/2.png": 2}))).class_names == ()


def test_loose_images_beside_class_folders_in_an_archive_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"1\.png lies beside the class folders"):
        opened(pack(tmp_path / "a.zip", images({"set/1.png": 1, "set/cat/2.png": 2})))


def test_names_that_point_outside_write_nothing(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    source = opened(pack(folder / "a.tar", images({f"{tmp_path}/x/evil.png": 5, "../../evil.png": 6})))
    assert values(source) == [5]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_member_above_the_limit_is_refused_by_name(tmp_path, suffix, monkeypatch):
    path = pack(tmp_path / f"set{suffix}", {"a/1.png": b"\0" * 5000})
    monkeypatch.setattr(members, "MAX_FILE_BYTES", 4000)
    with pytest.raises(UserError, match=r"a/1\.png in .* has 5000 bytes"):
        opened(path)


def test_a_zip_member_that_unpacks_to_more_than_it_claims_is_refused(tmp_path):
    path = pack(tmp_path / "bomb.zip", {"a/1.png": b"\0" * 1_000_000})
    path.write_bytes(path.read_bytes().replace((1_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    source = opened(path)
    with pytest.raises(UserError, match="does not match its checksum"):
        source.read(0, 1)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = pack(tmp_path / "secret.zip", {"a/1.png": b"x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        opened(path)


def test_a_link_in_place_of_an_image_is_refused(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="is a link"):
        opened(tmp_path / "links.tar")


def test_a_header_that_claims_an_absurd_name_is_refused(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    (tmp_path / "long.tar").write_bytes(info.tobuf() + b"\0" * 1024)
    with pytest.raises(UserError, match="claims 4294967296 bytes"):
        opened(tmp_path / "long.tar")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_that_is_cut_off_is_refused(tmp_path, suffix):
    path = pack(tmp_path / f"set{suffix}", images())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5 if suffix != ".tar" else 1600])
    with pytest.raises(UserError, match=f"set{suffix}"):
        opened(path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = pack(tmp_path / "a.tar", images())
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 1  # in the name of the second member: header, one block of content, header
    path.write_bytes(data)
    with pytest.raises(UserError, match="bad header"):
        opened(path)


@pytest.mark.parametrize("content", [b"", b"neither tar nor zip" * 100])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar"):
        opened(tmp_path / "a.tar")


def test_a_missing_archive_one_without_images_and_one_without_a_size_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        opened(tmp_path / "none.tar")
    with pytest.raises(UserError, match="is a folder"):
        opened(tmp_path)
    with pytest.raises(UserError, match="no images in it"):
        opened(pack(tmp_path / "a.zip", {"a.txt": b"x"}))
    with pytest.raises(UserError, match="--image-size"):
        open_source(f"archive:{tmp_path}/a.zip")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_member_that_is_no_image_is_refused_by_name(tmp_path, suffix):
    source = opened(pack(tmp_path / f"set{suffix}", {"a/bad.png": b"no image"}))
    with pytest.raises(UserError, match=r"a/bad\.png in .*set.* is not an image"):
        values(source)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_inventory_is_that_of_the_content_and_not_of_the_date(tmp_path, suffix):
    path = pack(tmp_path / f"set{suffix}", images())
    before = opened(path).inventory()
    path.touch()
    assert opened(path).inventory() == before
    pack(path, images(COLOURS | {"set/cat/1.png": 11}))
    assert opened(path).inventory() != before


@pytest.mark.parametrize("suffix", [".tar", ".zip", ".tar.gz"])
def test_an_archive_on_s3_is_read_in_place(tmp_path, bucket, suffix):
    storage.write_bytes(f"{bucket}/set{suffix}", pack(tmp_path / f"set{suffix}", images()).read_bytes())
    source = opened(f"{bucket}/set{suffix}")
    assert values(source, 2, 4) == [30, 40]
    with pytest.raises(UserError, match="there is no file"):
        opened(f"{bucket}/none{suffix}")
