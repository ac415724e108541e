"""NumPy files: arrays of images read by ranges, without pickle."""

import pickle
import zipfile

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.sources import open_source
from pipeline.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 1])


def npy(tmp_path, array, **options):
    np.save(tmp_path / "x.npy", array, **options)
    return f"npy:{tmp_path}/x.npy"


def npz(tmp_path, save=np.savez, **arrays):
    save(tmp_path / "x.npz", **arrays)
    return f"npz:{tmp_path}/x.npz"


def pixels(source, start=0, stop=None):
    stop = len(source) if stop is None else stop
    return np.stack([each.pixels.numpy() for each in source.samples(start, source.read(start, stop))])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB.transpose(0, 3, 1, 2)),
        (RGB.transpose(0, 3, 1, 2).copy(), RGB.transpose(0, 3, 1, 2)),
        (RGB[..., 0].copy(), RGB[:, None, :, :, 0]),
        (RGB[..., :1].copy(), RGB[:, None, :, :, 0]),
        (RGB[:, None, :, :, 0].copy(), RGB[:, None, :, :, 0]),
    ],
    ids=["channels last", "channels first", "grey", "one channel last", "one channel first"],
)
def test_an_array_of_any_layout_gives_its_images(tmp_path, array, expected):
    source = open_source(npy(tmp_path, array))
    assert (len(source), source.image_size, source.image_channels) == (6, 4, expected.shape[1])
    assert (source.class_names, source.reads_in_driver) == ((), False)
    assert np.array_equal(pixels(source), expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_images_and_labels_from_any_range(tmp_path, save):
    source = open_source(npz(tmp_path, save, images=RGB, labels=LABELS))
    assert source.class_names == ("0", "1", "2")
    for start, stop in ((1, 3), (4, 6), (0, 2)):
        samples = list(source.samples(start, source.read(start, stop)))
        assert [each.label for each in samples] == LABELS[start:stop].tolist()
        assert np.array_equal(pixels(source, start, stop), RGB.transpose(0, 3, 1, 2)[start:stop])


@pytest.mark.parametrize(("images", "labels"), [("x", "y"), ("x_train", "y_train"), ("arr_0", "arr_1")])
def test_the_usual_names_of_arrays_are_found(tmp_path, images, labels):
    source = open_source(npz(tmp_path, **{images: RGB, labels: LABELS[:, None], "other": np.zeros(3)}))
    assert next(source.samples(1, source.read(1, 2))).label == 2


def test_only_a_compressed_npz_must_be_read_in_the_driver(tmp_path):
    assert not open_source(npz(tmp_path, np.savez, x=RGB)).reads_in_driver
    assert open_source(npz(tmp_path, np.savez_compressed, x=RGB)).reads_in_driver


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_source_that_has_begun_to_read_survives_pickling(tmp_path, save):
    source = open_source(npz(tmp_path, save, x=RGB))
    source.read(2, 3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert copy.read(0, 6) == [image.tobytes() for image in RGB]


@pytest.mark.parametrize(
    "array",
    [RGB.astype(np.float32), RGB[0, 0], RGB[..., :2], np.asfortranarray(RGB)],
    ids=["floats", "two dimensions", "two channels", "Fortran order"],
)
def test_other_arrays_are_refused_with_what_is_allowed(tmp_path, array):
    with pytest.raises(UserError, match=r"allowed is uint8 of shape \[N, H, W\]"):
        open_source(npy(tmp_path, array), image_size=4)


def test_an_array_of_objects_is_refused_and_not_unpickled(tmp_path):
    with pytest.raises(UserError, match="holds object"):
        open_source(npy(tmp_path, np.array([{"a": 1}, None], dtype=object), allow_pickle=True))


def test_labels_that_are_objects_are_refused_and_not_unpickled(tmp_path):
    with pytest.raises(UserError, match=r"labels\.npy in .* holds object"):
        open_source(npz(tmp_path, images=RGB, labels=np.array([None] * 6, dtype=object)))


@pytest.mark.parametrize("labels", [LABELS[:3], LABELS.astype(float), np.stack([LABELS, LABELS], 1)])
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, labels):
    with pytest.raises(UserError, match=r"labels must be integers of shape \[6\]"):
        open_source(npz(tmp_path, images=RGB, labels=labels))


@pytest.mark.parametrize("label", [-1, 10**9])
def test_a_label_that_is_no_class_is_refused(tmp_path, label):
    with pytest.raises(UserError, match=f"label {label} is not a class"):
        open_source(npz(tmp_path, images=RGB, labels=np.array([0, 0, 0, 0, 0, label])))


def test_an_npz_without_images_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"holds pictures\.npy; images must be in one of: images, x"):
        open_source(npz(tmp_path, pictures=RGB))


def test_images_that_are_not_square_need_a_size(tmp_path):
    spec = npy(tmp_path, np.zeros((2, 4, 6), dtype=np.uint8))
    with pytest.raises(UserError, match="4x6 are not square; give --image-size"):
        open_source(spec)
    assert pixels(open_source(spec, image_size=4)).shape == (2, 1, 4, 4)


def test_images_can_be_had_in_another_size_and_in_colour(tmp_path):
    source = open_source(npy(tmp_path, RGB[..., 0].copy()), image_size=8, image_channels=3)
    assert pixels(source).shape == (6, 3, 8, 8)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    spec = npy(tmp_path, RGB)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="is cut off"):
        open_source(spec)


def test_a_member_that_is_shorter_than_its_shape_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", RGB)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.npy in .* is damaged"):
        open_source(f"npz:{tmp_path}/x.npz")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_what_is_no_numpy_file_is_refused(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"neither" * 100)
    with pytest.raises(UserError, match=f"{tmp_path}/x"):
        open_source(f"{kind}:{tmp_path}/x")
    with pytest.raises(UserError, match="there is no file"):
        open_source(f"{kind}:{tmp_path}/none")


def test_an_empty_array_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        open_source(npy(tmp_path, RGB[:0]))


def test_the_inventory_changes_with_the_pixels(tmp_path):
    before = open_source(npy(tmp_path, RGB)).inventory()
    assert open_source(npy(tmp_path, RGB)).inventory() == before
    assert open_source(npy(tmp_path, 255 - RGB)).inventory() != before


def test_numpy_files_on_s3_are_read_by_ranges(tmp_path, bucket):
    npy(tmp_path, RGB)
    npz(tmp_path, x=RGB, y=LABELS)
    for name in ("x.npy", "x.npz"):
        storage.write_bytes(f"{bucket}/{name}", (tmp_path / name).read_bytes())
        source = open_source(f"{name[2:]}:{bucket}/{name}")
        assert source.read(2, 5) == [image.tobytes() for image in RGB[2:5]]
