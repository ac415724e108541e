"""Small files in the layouts in which data sets are published, made in the working directory."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def image(size: tuple[int, int], form: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def cifar10() -> None:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    random = np.random.default_rng(0)
    with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/batches.meta.txt", ("\n".join(names) + "\n\n").encode())
        for batch in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
            count = 16 if batch == "test_batch.bin" else 4  # enough for a batch of training
            records = random.integers(0, 256, (count, 3073), dtype=np.uint8)
            records[:, 0] = random.integers(0, 10, count)
            add(archive, f"cifar-10-batches-bin/{batch}", records.tobytes())


def celeba_hq() -> None:
    with zipfile.ZipFile("celeba_hq_256.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"celeba_hq_256/{number:05d}.jpg", image((256, 256), "JPEG", number))


def lsun() -> None:
    Path("church_outdoor").mkdir()
    for number in range(4):
        name = f"church_outdoor/{number:040x}.webp"
        Path(name).write_bytes(image((256, 300 + number), "WEBP", number))


def imagenet64() -> None:
    with tarfile.open("train_64x64.tar", "w") as archive:
        for number in range(1, 7):
            add(archive, f"train_64x64/{number:07d}.png", image((64, 64), "PNG", number))


def imagenet64_with_labels() -> None:
    Path("Imagenet64_train").mkdir()
    random = np.random.default_rng(0)
    for number in range(1, 3):
        data = random.integers(0, 256, (3, 3 * 64 * 64), dtype=np.uint8)
        batch = {"data": data, "labels": np.array([1000, number, 1]), "mean": data.mean(axis=0)}
        np.savez(f"Imagenet64_train/train_data_batch_{number}.npz", **batch)


def hugging_face() -> None:
    Path("data").mkdir()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["tench", "goldfish"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for part in range(2):
        images = pa.array([{"bytes": image((70, 64), "PNG", part), "path": None}] * 3, struct)
        table = pa.table({"image": images, "label": pa.array([0, 1, 0])}).replace_schema_metadata(metadata)
        pq.write_table(table, f"data/train-0000{part}-of-00002.parquet")


LAYOUTS: dict[str, tuple[Callable[[], None], int, int, int]] = {
    "cifar10": (cifar10, 20, 32, 10),
    "cifar10-test": (cifar10, 16, 32, 10),
    "celebahq256": (celeba_hq, 5, 256, 0),
    "lsun256": (lsun, 4, 256, 0),
    "imagenet64": (imagenet64, 6, 64, 0),
    "imagenet64-labels": (imagenet64_with_labels, 6, 64, 1000),
    "NAME": (hugging_face, 6, 64, 2),
}
"""By the name that the command gives: how to make the files, number of images, size and classes that must come out."""
