"""The images that all contenders read: made once, kept in a folder, and written in the format of each of them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from stand_in import stand_in_for_torchvision

__all__ = ["FORMATS", "SIZE", "Corpus", "ensure_format", "make_corpus", "offline_environment"]

SIZE = 32
"""Height and width of the images, pixels."""
_CLASSES = 10
_CHUNK = 1000
_IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
_PNG_LEVEL = 6  # as pipeline.images writes them: every format holds the same files


@dataclass(frozen=True)
class Corpus:
    """Where the images lie in each format.

    Attributes:
        root: Folder of everything below.
        num_images: How many.
        mean: Mean pixel of all images, in [0, 1]; a contender must deliver the same.
        mean_bytes: Mean size of a PNG file.
    """

    root: Path
    num_images: int
    mean: float
    mean_bytes: float

    @property
    def files(self) -> Path:
        """PNG files in class folders."""
        return self.root / "png"

    @property
    def shards(self) -> Path:
        """Our data set: WebDataset shards, their indexes and the manifest."""
        return self.root / "shards"

    @property
    def huggingface(self) -> Path:
        """The cache that ``datasets`` fills when it first reads the class folders."""
        return self.root / "huggingface"

    @property
    def mds(self) -> Path:
        """MosaicML's format."""
        return self.root / "mds"

    @property
    def litdata(self) -> Path:
        """LitData's format."""
        return self.root / "litdata"


def make_corpus(folder: Path, source: str, num_images: int) -> Corpus:
    """Makes the images and our data set of them, unless they are there.

    Args:
        folder: Corpora lie in it.
        source: ``synthetic`` or ``folder:PATH``, images in class folders.
        num_images: How many.
    """
    # Here and not above: a peer may run in an environment of its own, without what we need.
    from pipeline.config import PrepareConfig
    from pipeline.data.prepare import prepare
    from pipeline.data.sources import open_source

    name = source if source == "synthetic" else hashlib.sha256(source.encode()).hexdigest()[:12]
    root = folder / f"{name}-{num_images}"
    record = root / "corpus.json"
    if not record.is_file():
        shutil.rmtree(root, ignore_errors=True)
        facts = _write_files(
            root / "png", _synthetic(num_images) if source == "synthetic" else _found(source), num_images
        )
        record.write_text(json.dumps(facts))
    corpus = Corpus(root, **json.loads(record.read_text()))
    spec = f"folder:{corpus.files}"
    images = open_source(spec, image_size=SIZE, image_channels=3, crop="center")
    prepare(images, PrepareConfig(source=spec, image_size=SIZE), str(corpus.shards))
    return corpus


def _write_files(folder: Path, images: Iterator[tuple[str, Image.Image]], num_images: int) -> dict[str, Any]:
    total, num_bytes, number = 0.0, 0, -1
    for number, (name, image) in zip(range(num_images), images, strict=False):
        path = folder / name / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, compress_level=_PNG_LEVEL)
        total += float(np.asarray(image).mean()) / 255
        num_bytes += path.stat().st_size
    if number + 1 != num_images:
        raise SystemExit(f"the source holds {number + 1} images, fewer than --images {num_images}")
    return {"num_images": num_images, "mean": total / num_images, "mean_bytes": num_bytes / num_images}


def _found(source: str) -> Iterator[tuple[str, Image.Image]]:
    """Images of a folder of class folders, classes in turn; those of another size are resized."""
    root = Path(source.removeprefix("folder:"))
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    listings = [sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGE_EXTENSIONS) for path in folders]
    for number in range(max(len(listing) for listing in listings)):
        for folder, listing in zip(folders, listings, strict=True):
            if number < len(listing):
                image = Image.open(listing[number]).convert("RGB")
                yield folder.name, image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE))


def _synthetic(num_images: int) -> Iterator[tuple[str, Image.Image]]:
    """Smooth random fields with the 1/f spectrum of photographs, plus noise: as PNG they are as large as CIFAR's."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :])
    gain = 1 / np.maximum(frequency, 1 / SIZE) ** 1.7
    for start in range(0, num_images, _CHUNK):
        white = rng.standard_normal((_CHUNK, 4, SIZE, SIZE))
        fields = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(SIZE, SIZE))
        fields /= fields.std(axis=(2, 3), keepdims=True)
        # One field is brightness, the same in all channels; three faint ones are colour.
        pixels = fields[:, :1] * 50 + fields[:, 1:] * 12 + rng.standard_normal((_CHUNK, 3, SIZE, SIZE)) * 2.5
        pixels += rng.uniform(80, 160, size=(_CHUNK, 1, 1, 1))
        bytes_ = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        for number, array in enumerate(bytes_[: num_images - start], start):
            yield f"class_{number % _CLASSES}", Image.fromarray(array)


def _labelled_files(corpus: Corpus) -> list[tuple[str, int]]:
    classes = {path.name: label for label, path in enumerate(sorted(corpus.files.iterdir()))}
    return [(str(path), classes[path.parent.name]) for path in sorted(corpus.files.glob("*/*.png"))]


def _write_huggingface(corpus: Corpus) -> None:
    import datasets

    datasets.load_dataset("imagefolder", data_dir=str(corpus.files), split="train", cache_dir=str(corpus.huggingface))


def _write_mds(corpus: Corpus) -> None:
    stand_in_for_torchvision()
    from streaming import MDSWriter

    with MDSWriter(out=str(corpus.mds), columns={"image": "png", "label": "int"}) as writer:
        for path, label in _labelled_files(corpus):
            with Image.open(path) as image:
                writer.write({"image": image, "label": label})


def _read_file(item: tuple[str, int]) -> dict[str, Any]:
    # The file's bytes: LitData would store a PNG picture as raw pixels, which would be another experiment.
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def _write_litdata(corpus: Corpus) -> None:
    import litdata

    litdata.optimize(_read_file, _labelled_files(corpus), str(corpus.litdata), chunk_bytes="64MB", num_workers=1)


FORMATS: dict[str, Callable[[Corpus], None]] = {
    "huggingface": _write_huggingface,
    "mds": _write_mds,
    "litdata": _write_litdata,
}
"""How the formats are written that only some contenders read; each once, by ``measure.py`` in a process of its own."""


def ensure_format(corpus: Corpus, name: str) -> None:
    """Writes one of ``FORMATS``, unless it is there whole."""
    done = corpus.root / f"{name}.done"
    if not done.exists():
        shutil.rmtree(corpus.root / name, ignore_errors=True)
        FORMATS[name](corpus)
        done.touch()


def offline_environment() -> dict[str, str]:
    """The environment of a measurement: nothing may look for updates on the network."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
