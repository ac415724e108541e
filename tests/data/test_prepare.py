"""Prepare: whole or continued, never mixed."""

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.config import PrepareConfig
from pipeline.data import prepare as prepare_module
from pipeline.data.manifest import ShardIndex, load_manifest
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_images
from pipeline.data.sources import ArchiveSource, DigitsSource, open_source
from pipeline.errors import UserError, WorldError


@pytest.fixture
def destination(tmp_path):
    return str(tmp_path / "digits")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(10):
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number * 20, dtype=np.uint8)).save(path)
    return folder


def content(folder):
    return {os.path.relpath(file, folder): storage.read_bytes(file) for file in storage.list_files(str(folder))}


def prepare_source(spec, destination, *, on_progress=None, use_ray=False, **knobs):
    config = PrepareConfig(source=spec, **knobs)
    source = open_source(spec, image_size=config.image_size, image_channels=config.image_channels, crop=config.crop)
    return prepare(source, config, destination, on_progress=on_progress, use_ray=use_ray)


def prepare_digits(destination, **options):
    return prepare_source("digits", destination, **{"images_per_shard": 500, **options})


def index_of(destination, number):
    return ShardIndex.from_json(storage.read_bytes(f"{destination}/index/{number:06d}.json"))


def test_every_image_of_the_source_is_in_the_shards_in_order(destination):
    result = prepare_digits(destination)
    manifest = load_manifest(destination)
    assert result.manifest == manifest
    assert (result.num_written, result.num_skipped, result.location) == (4, 0, destination)
    assert manifest.shard_sizes == (500, 500, 500, 297)
    assert (manifest.num_images, manifest.image_size, manifest.image_channels) == (1797, 8, 1)
    assert (manifest.source, manifest.class_names) == ("digits", tuple("0123456789"))
    assert [key for number in range(4) for key in index_of(destination, number).keys] == [
        f"{i:09d}" for i in range(1797)
    ]
    source = open_source("digits")
    expected = list(source.samples(500, source.read(500, 1000)))
    assert index_of(destination, 1).labels.tolist() == [each.label for each in expected]
    assert torch.equal(read_images(destination, manifest, 1), torch.stack([each.pixels for each in expected]))


def test_the_same_call_gives_the_same_bytes_elsewhere(tmp_path):
    prepare_digits(str(tmp_path / "a"))
    prepare_digits(str(tmp_path / "b"))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_progress_counts_images_up_to_all(destination):
    seen = []
    prepare_digits(destination, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(500, 1797), (1000, 1797), (1500, 1797), (1797, 1797)]


def test_a_finished_data_set_is_left_alone(destination):
    first = prepare_digits(destination)
    before = content(destination)
    again = prepare_digits(destination)
    assert (again.num_written, again.num_skipped) == (0, 4)
    assert again.manifest == first.manifest
    assert content(destination) == before


def kill_after(monkeypatch, num_shards, destination, spec="digits", **options):
    """Kills prepare, as far as a test in one process can: the write of the next shard never happens."""
    written = []

    def write(location, data):
        if location.endswith(".tar"):
            if len(written) == num_shards:
                raise KeyboardInterrupt
            written.append(location)
        storage_write(location, data)

    storage_write = storage.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", write)
        with pytest.raises(KeyboardInterrupt):
            prepare_source(spec, destination, **{"images_per_shard": 500, **options})


def test_a_killed_prepare_leaves_no_manifest_and_continues_without_redoing_finished_shards(
    destination, tmp_path, monkeypatch
):
    kill_after(monkeypatch, 2, destination)
    assert {file for file in content(destination) if not file.startswith("index/")} == {
        "source.json",
        "shard-000000.tar",
        "shard-000001.tar",
    }
    with pytest.raises(UserError, match="half-written"):
        load_manifest(destination)

    loaded = []
    read = DigitsSource.read
    monkeypatch.setattr(
        DigitsSource, "read", lambda self, start, stop: loaded.append((start, stop)) or read(self, start, stop)
    )
    result = prepare_digits(destination)
    assert (result.num_written, result.num_skipped) == (2, 2)
    assert loaded == [(1000, 1500), (1500, 1797)]

    prepare_digits(str(tmp_path / "unbroken"))
    assert content(destination) == content(tmp_path / "unbroken")


def test_a_shard_that_is_damaged_when_prepare_continues_is_made_again(destination, tmp_path, monkeypatch):
    kill_after(monkeypatch, 2, destination)
    path = f"{destination}/shard-000001.tar"
    storage.write_bytes(path, storage.read_bytes(path)[:5000])
    assert prepare_digits(destination).num_skipped == 1
    prepare_digits(str(tmp_path / "unbroken"))
    assert content(destination) == content(tmp_path / "unbroken")


def test_a_finished_data_set_is_never_overwritten_by_another(destination):
    prepare_digits(destination)
    before = content(destination)
    for options in ({"image_size": 16}, {"image_channels": 3}, {"images_per_shard": 400}):
        with pytest.raises(UserError, match=r"holds another data set .* choose another --data or delete it"):
            prepare_digits(destination, **options)
    assert content(destination) == before


def test_a_data_set_that_was_begun_is_never_continued_with_other_options(destination, monkeypatch):
    kill_after(monkeypatch, 1, destination)
    with pytest.raises(UserError, match=r"beginning of another data set .* choose another --data"):
        prepare_digits(destination, image_size=16)


def test_shards_of_unknown_origin_are_never_mixed_in(destination):
    storage.write_bytes(f"{destination}/shard-000007.tar", b"somebody else's")
    with pytest.raises(UserError, match="unknown origin"):
        prepare_digits(destination)
    assert set(content(destination)) == {"shard-000007.tar"}


def test_an_unreadable_source_record_is_taken_for_another_data_set(destination):
    storage.write_bytes(f"{destination}/source.json", b"{")
    with pytest.raises(UserError, match="beginning of another data set"):
        prepare_digits(destination)


def test_a_changed_folder_is_another_source(images, destination):
    arguments = {"image_size": 8, "images_per_shard": 4}
    result = prepare_source(f"folder:{images}", destination, **arguments)
    assert result.manifest.class_names == ("cat", "dog")
    assert prepare_source(f"folder:{images}", destination, **arguments).num_written == 0
    (images / "cat" / "1.png").rename(images / "cat" / "11.png")
    with pytest.raises(UserError, match="holds another data set"):
        prepare_source(f"folder:{images}", destination, **arguments)


def test_the_digest_is_the_same_wherever_the_images_lay(images, tmp_path):
    first = prepare_source(f"folder:{images}", str(tmp_path / "a"), image_size=8, images_per_shard=4)
    images.rename(tmp_path / "moved")
    second = prepare_source(f"folder:{tmp_path}/moved", str(tmp_path / "b"), image_size=8, images_per_shard=4)
    assert first.manifest.digest == second.manifest.digest


def test_impossible_images_per_shard_are_refused(destination):
    with pytest.raises(UserError, match="--images-per-shard 0"):
        prepare_digits(destination, images_per_shard=0)


def test_a_shard_that_another_node_kept_to_itself_is_noticed_before_the_manifest_is_written(destination, monkeypatch):
    make = prepare_module._make_shard

    def make_elsewhere(shared, number, *rest):
        finished = make(shared, number, *rest)
        if number == 2:
            os.remove(f"{destination}/shard-000002.tar")
        return finished

    monkeypatch.setattr(prepare_module, "_make_shard", make_elsewhere)
    with pytest.raises(WorldError, match=r"shard-000002\.tar was written on another node .* s3://"):
        prepare_digits(destination)
    assert "manifest.json" not in content(destination)


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_tasks_write_the_same_bytes_as_one_process(cluster, destination, tmp_path):
    seen = []
    result = prepare_digits(
        destination, images_per_shard=200, use_ray=True, on_progress=lambda done, total: seen.append(done)
    )
    assert (result.num_written, seen[-1], sorted(seen)) == (9, 1797, seen)
    prepare_digits(str(tmp_path / "here"), images_per_shard=200)
    assert content(destination) == content(tmp_path / "here")
    assert prepare_digits(destination, images_per_shard=200, use_ray=True).num_written == 0


@pytest.mark.slow
def test_a_bad_image_in_a_ray_task_is_one_line_and_the_rest_is_continued(cluster, images, destination):
    bad = images / "dog" / "8.png"
    good = bad.read_bytes()
    bad.write_bytes(b"x" * len(good))
    arguments = {"image_size": 8, "images_per_shard": 2, "use_ray": True}
    with pytest.raises(UserError) as raised:
        prepare_source(f"folder:{images}", destination, **arguments)
    assert type(raised.value) is UserError
    assert "8.png is not an image" in str(raised.value)
    assert "\n" not in str(raised.value)
    bad.write_bytes(good)
    result = prepare_source(f"folder:{images}", destination, **arguments)
    assert result.num_written + result.num_skipped == 5
    assert json.loads(storage.read_bytes(f"{destination}/manifest.json"))["num_images"] == 10


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_other_formats_are_stored_and_read(images, destination, image_format):
    options = {"image_size": 8, "images_per_shard": 4, "image_format": image_format, "image_quality": 100}
    manifest = prepare_source(f"folder:{images}", destination, **options).manifest
    assert (manifest.image_format, index_of(destination, 0).kinds) == (image_format, ((image_format, 8, 8, 3),))
    shades = [
        int(image.float().mean().round()) for number in range(3) for image in read_images(destination, manifest, number)
    ]
    assert sorted(shades) == pytest.approx([20 * number for number in range(10)], abs=2)


def test_shard_bytes_gives_shards_of_about_that_size_and_the_same_cuts_when_continued(destination, tmp_path):
    manifest = prepare_digits(destination, shard_bytes=200_000).manifest
    sizes = [shard.num_bytes for shard in manifest.shards[:-1]]
    assert len(sizes) > 10
    assert all(120_000 < size < 280_000 for size in sizes)
    assert prepare_digits(str(tmp_path / "again"), shard_bytes=200_000).manifest.shard_sizes == manifest.shard_sizes


def test_shard_bytes_gives_the_same_cuts_when_it_continues_after_a_kill(destination, tmp_path, monkeypatch):
    kill_after(monkeypatch, 3, destination, shard_bytes=400_000)
    result = prepare_digits(destination, shard_bytes=400_000)
    assert result.num_skipped == 3
    prepare_digits(str(tmp_path / "unbroken"), shard_bytes=400_000)
    assert content(destination) == content(tmp_path / "unbroken")


def test_a_shard_whose_index_was_not_written_any_more_is_made_again(destination, tmp_path, monkeypatch):
    kill_after(monkeypatch, 2, destination)
    os.remove(f"{destination}/index/000001.json")
    assert prepare_digits(destination).num_skipped == 1
    prepare_digits(str(tmp_path / "unbroken"))
    assert content(destination) == content(tmp_path / "unbroken")


def compressed_tar(folder, images):
    """Can only be read from its beginning."""
    with tarfile.open(folder / "images.tar.gz", "w:gz") as tar:
        for file in sorted(images.rglob("*.png")):
            tar.add(file, f"images/{file.relative_to(images)}")
    return f"archive:{folder}/images.tar.gz"


def test_a_source_that_is_read_from_its_beginning_gives_the_same_images_as_its_folder(images, tmp_path):
    options = {"image_size": 8, "images_per_shard": 3}
    first = prepare_source(f"folder:{images}", str(tmp_path / "a"), **options)
    second = prepare_source(compressed_tar(tmp_path, images), str(tmp_path / "b"), **options)
    assert first.manifest.digest == second.manifest.digest


def test_a_source_that_is_read_from_its_beginning_is_not_read_for_shards_that_are_done(
    images, tmp_path, destination, monkeypatch
):
    spec, options = compressed_tar(tmp_path, images), {"image_size": 8, "images_per_shard": 3}
    whole = prepare_source(spec, str(tmp_path / "whole"), **options)
    kill_after(monkeypatch, 2, destination, spec=spec, **options)
    taken = []
    read = ArchiveSource.read
    monkeypatch.setattr(
        ArchiveSource, "read", lambda self, start, stop: taken.append((start, stop)) or read(self, start, stop)
    )
    assert prepare_source(spec, destination, **options).manifest == whole.manifest
    assert taken == [(6, 9), (9, 10)]


@pytest.mark.slow
def test_ray_tasks_get_the_images_of_a_source_that_is_read_from_its_beginning(cluster, images, tmp_path):
    spec, options = compressed_tar(tmp_path, images), {"image_size": 8, "images_per_shard": 3}
    prepare_source(spec, str(tmp_path / "a"), use_ray=True, **options)
    prepare_source(spec, str(tmp_path / "b"), **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_exact_duplicates_are_counted(images, destination):
    for number in (1, 3):
        (images / "cat" / f"copy-{number}.png").write_bytes((images / "cat" / f"{number}.png").read_bytes())
    assert prepare_source(f"folder:{images}", destination, image_size=8).manifest.num_duplicates == 2


def test_an_empty_source_is_refused(destination):
    class Nothing(DigitsSource):
        def __len__(self):
            return 0

    with pytest.raises(UserError, match="holds no images"):
        prepare(Nothing(), PrepareConfig(), destination)


def test_grey_webp_is_refused_since_there_is_none(destination):
    with pytest.raises(UserError, match="WebP has no grey images"):
        prepare_digits(destination, image_format="webp")
