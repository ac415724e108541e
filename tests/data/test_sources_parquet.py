"""Parquet files: images as Hugging Face's datasets stores them, or as plain binary."""

import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.sources import open_source
from pipeline.errors import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def hugging_face(images, labels=None, names=None):
    columns = {"image": pa.array([{"bytes": png(value), "path": f"{value}.png"} for value in images], STRUCT)}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        features["label"] = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write(path, table, rows=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def opened(pattern, **options):
    return open_source(f"parquet:{pattern}", **{"image_size": 4, "image_channels": 1, **options})


def found(source, start=0, stop=None):
    stop = len(source) if stop is None else stop
    return [(int(each.pixels[0, 0, 0]), each.label) for each in source.samples(start, source.read(start, stop))]


def test_images_and_class_names_come_from_a_hugging_face_file(tmp_path):
    source = opened(write(tmp_path / "a.parquet", hugging_face([10, 20, 30], [1, 0, 1], ["cat", "dog"])))
    assert source.class_names == ("cat", "dog")
    assert found(source) == [(10, 1), (20, 0), (30, 1)]
    assert not source.reads_in_driver


def test_any_range_over_row_groups_and_files_is_read(tmp_path):
    write(tmp_path / "a.parquet", hugging_face([0, 1, 2, 3, 4]))
    write(tmp_path / "b.parquet", hugging_face([5, 6, 7]), rows=3)
    source = opened(tmp_path)
    for start in range(8):
        for stop in range(start + 1, 9):
            assert [value for value, _ in found(source, start, stop)] == list(range(start, stop))
    assert source.read(3, 3) == []


def test_plain_binary_images_are_read(tmp_path):
    table = pa.table({"jpg": [png(7), png(8)], "caption": ["a", "b"]})
    source = opened(write(tmp_path / "a.parquet", table))
    assert (source.class_names, found(source)) == ((), [(7, None), (8, None)])


def test_the_only_column_of_images_needs_no_known_name(tmp_path):
    assert found(opened(write(tmp_path / "a.parquet", pa.table({"scan": [png(7)], "n": [1]})))) == [(7, None)]


@pytest.mark.parametrize("columns", [{"n": [1], "image": ["path.png"]}, {"left": [b"x"], "right": [b"x"]}])
def test_without_one_column_of_images_all_columns_are_listed(tmp_path, columns):
    with pytest.raises(UserError, match=", ".join(rf"{name} \(\w+\)" for name in columns)):
        opened(write(tmp_path / "a.parquet", pa.table(columns)))


def test_integer_labels_without_names_are_named_by_their_number(tmp_path):
    write(tmp_path / "a.parquet", hugging_face([1, 2], [0, 1]))
    write(tmp_path / "b.parquet", hugging_face([3], [3]))
    source = opened(tmp_path)
    assert source.class_names == ("0", "1", "2", "3")
    assert [label for _, label in found(source)] == [0, 1, 3]


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_text_labels_of_all_files_are_sorted_into_classes(tmp_path, as_dictionary):
    for name, labels in (("a", ["dog", "cat"]), ("b", ["ant", "dog"])):
        column = pa.array(labels).dictionary_encode() if as_dictionary else pa.array(labels)
        write(tmp_path / f"{name}.parquet", pa.table({"image": [png(1), png(2)], "labels": column}))
    source = opened(tmp_path)
    assert source.class_names == ("ant", "cat", "dog")
    assert [label for _, label in found(source)] == [2, 1, 0, 2]


def test_labels_of_another_type_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'label' is double; labels must be integers or text"):
        opened(write(tmp_path / "a.parquet", hugging_face([1], [0.5])))


def test_a_label_without_a_name_is_refused_by_row(tmp_path):
    source = opened(write(tmp_path / "a.parquet", hugging_face([1, 2, 3], [0, 1, -1], ["cat", "dog"])))
    with pytest.raises(UserError, match=r"row 2 of .*a\.parquet: label -1 has no name"):
        found(source)


def test_an_empty_label_is_refused(tmp_path):
    source = opened(write(tmp_path / "a.parquet", hugging_face([1, 2], [0, None], ["cat"])))
    with pytest.raises(UserError, match=r"row 1 of .*a\.parquet has no 'label'"):
        source.read(0, 2)
    with pytest.raises(UserError, match=r"'label' of .* has empty rows"):
        opened(write(tmp_path / "a.parquet", hugging_face([1, 2], ["x", None])))


@pytest.mark.parametrize("missing", [None, {"bytes": None, "path": None}])
def test_an_empty_image_is_refused_by_file_and_row(tmp_path, missing):
    column = pa.array([{"bytes": png(1), "path": "x"}] * 3 + [missing], STRUCT)
    source = opened(write(tmp_path / "a.parquet", pa.table({"image": column})))
    with pytest.raises(UserError, match=r"row 3 of .*a\.parquet has no image"):
        source.read(3, 4)


def test_an_image_that_is_only_a_path_is_refused(tmp_path):
    column = pa.array([{"bytes": None, "path": "/etc/passwd"}], STRUCT)
    source = opened(write(tmp_path / "a.parquet", pa.table({"image": column})))
    with pytest.raises(UserError, match="embed the bytes"):
        source.read(0, 1)


def test_a_row_that_is_no_image_is_refused_by_file_and_row(tmp_path):
    source = opened(write(tmp_path / "a.parquet", pa.table({"image": [png(1), b"no image"]})))
    with pytest.raises(UserError, match=r"row 1 of .*a\.parquet is not an image"):
        found(source)


def test_files_of_different_data_sets_are_not_mixed(tmp_path):
    write(tmp_path / "a.parquet", hugging_face([1], [0], ["cat"]))
    write(tmp_path / "b.parquet", hugging_face([1], [0], ["dog"]))
    with pytest.raises(UserError, match=r"b\.parquet has other .* than .*a\.parquet"):
        opened(tmp_path)


def test_a_pattern_chooses_files(tmp_path):
    for number, name in enumerate(("train-0", "train-1", "test-0")):
        write(tmp_path / "data" / f"{name}.parquet", hugging_face([number]))
    assert [value for value, _ in found(opened(f"{tmp_path}/data/train-*.parquet"))] == [0, 1]


def test_missing_files_files_without_rows_and_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no files at"):
        opened(tmp_path / "none")
    with pytest.raises(UserError, match="no rows in"):
        opened(write(tmp_path / "empty.parquet", hugging_face([])))
    (tmp_path / "text.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"text\.parquet is no Parquet file"):
        opened(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="--image-size"):
        open_source(f"parquet:{tmp_path}")


def test_a_parquet_source_survives_pickling(tmp_path):
    source = opened(write(tmp_path / "a.parquet", hugging_face([1, 2, 3], ["b", "a", "b"])))
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert found(copy) == found(source)


def test_the_inventory_changes_with_the_content(tmp_path):
    before = opened(write(tmp_path / "a.parquet", hugging_face([1, 2]))).inventory()
    assert opened(write(tmp_path / "a.parquet", hugging_face([1, 2]))).inventory() == before
    assert opened(write(tmp_path / "a.parquet", hugging_face([1, 3]))).inventory() != before


def test_parquet_files_on_s3_are_read_in_place(tmp_path, bucket):
    for name, values in (("a", [0, 1, 2]), ("b", [3])):
        path = write(tmp_path / f"{name}.parquet", hugging_face(values))
        storage.write_bytes(f"{bucket}/set/{name}.parquet", path.read_bytes())
    assert [value for value, _ in found(opened(f"{bucket}/set"), 1, 4)] == [1, 2, 3]
    assert found(opened(f"{bucket}/set/b.parquet")) == [(3, None)]
