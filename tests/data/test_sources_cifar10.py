"""CIFAR-10 as its official binary archive and as the folder that it unpacks to."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.sources import open_source
from pipeline.errors import UserError

BATCHES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def records(seed, count):
    data = np.random.default_rng(seed).integers(0, 256, (count, 3073), dtype=np.uint8)
    data[:, 0] %= 10
    return data


def content():
    files = {name: records(seed, 2 + seed).tobytes() for seed, name in enumerate(BATCHES)}
    return files | {"batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}


def folder(tmp_path, files):
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def archive(tmp_path, files):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        # Not in the order of the numbers, as in the official archive.
        for name, data in reversed(files.items()):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [folder, archive])
def test_the_training_images_are_the_records_of_the_five_batches_in_their_order(tmp_path, form):
    source = open_source(f"cifar10:{form(tmp_path, content())}")
    expected = np.concatenate([records(seed, 2 + seed) for seed in range(5)])
    assert (len(source), source.image_size, source.image_channels) == (20, 32, 3)
    samples = list(source.samples(0, source.read(0, 20)))
    assert [each.label for each in samples] == expected[:, 0].tolist()
    assert np.array_equal(np.stack([each.pixels for each in samples]), expected[:, 1:].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("form", [folder, archive])
def test_the_test_images_are_those_of_the_test_batch(tmp_path, form):
    source = open_source(f"cifar10-test:{form(tmp_path, content())}")
    assert len(source) == 7
    (sample,) = source.samples(3, source.read(3, 4))
    assert sample.pixels.flatten().tolist() == records(5, 7)[3, 1:].tolist()


@pytest.mark.parametrize("form", [folder, archive])
def test_a_range_over_two_batches_is_read_after_pickling(tmp_path, form):
    source = open_source(f"cifar10:{form(tmp_path, content())}")
    expected = np.concatenate([records(seed, 2 + seed) for seed in range(5)])[1:7]
    assert pickle.loads(pickle.dumps(source)).read(1, 7) == [record.tobytes() for record in expected]


def test_only_the_archive_must_be_read_in_the_driver(tmp_path):
    assert open_source(f"cifar10:{archive(tmp_path, content())}").reads_in_driver
    assert not open_source(f"cifar10:{folder(tmp_path, content())}").reads_in_driver


def test_class_names_come_from_the_archive_or_are_the_usual_ten(tmp_path):
    files = content() | {"batches.meta.txt": "\n".join(f"class {n}" for n in range(10)).encode()}
    assert open_source(f"cifar10:{archive(tmp_path, files)}").class_names[3] == "class 3"
    del files["batches.meta.txt"]
    assert list(open_source(f"cifar10:{folder(tmp_path, files)}").class_names) == NAMES


def test_cifar10_can_be_had_smaller_and_in_grey(tmp_path):
    source = open_source(f"cifar10:{folder(tmp_path, content())}", image_size=8, image_channels=1)
    assert next(source.samples(0, source.read(0, 1))).pixels.shape == (1, 8, 8)


@pytest.mark.parametrize("form", [folder, archive])
def test_a_part_of_a_record_is_refused_by_batch(tmp_path, form):
    files = content() | {"data_batch_2.bin": b"\0" * 4000}
    with pytest.raises(UserError, match=r"data_batch_2\.bin is damaged .4000 bytes"):
        open_source(f"cifar10:{form(tmp_path, files)}")


@pytest.mark.parametrize("form", [folder, archive])
def test_a_missing_batch_is_refused_by_name(tmp_path, form):
    files = content()
    del files["data_batch_4.bin"]
    with pytest.raises(UserError, match=r"there is no data_batch_4\.bin"):
        open_source(f"cifar10:{form(tmp_path, files)}")


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no data_batch_1"):
        open_source(f"cifar10:{tmp_path}/none")


def test_a_label_without_a_name_is_refused(tmp_path):
    files = content() | {"data_batch_1.bin": b"\x0b" + b"\0" * 3072}
    source = open_source(f"cifar10:{folder(tmp_path, files)}")
    with pytest.raises(UserError, match="image 0 has the label 11"):
        next(source.samples(0, source.read(0, 1)))


def test_the_inventory_changes_with_the_content(tmp_path):
    root = folder(tmp_path, content())
    before = open_source(f"cifar10:{root}").inventory()
    (root / "data_batch_1.bin").write_bytes(records(9, 2).tobytes())
    assert open_source(f"cifar10:{root}").inventory() != before


def test_cifar10_on_s3_is_read_as_an_archive_and_as_a_folder(tmp_path, bucket):
    storage.write_bytes(f"{bucket}/cifar.tar.gz", archive(tmp_path, content()).read_bytes())
    for name, data in content().items():
        storage.write_bytes(f"{bucket}/cifar/{name}", data)
    packed, unpacked = (open_source(f"cifar10:{bucket}/{name}") for name in ("cifar.tar.gz", "cifar"))
    assert packed.read(0, 20) == unpacked.read(0, 20)
