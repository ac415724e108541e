"""Loaders of others, used as their documentation shows, and tuned where that is common.

Each function imports what it needs and returns how to open the loader on a corpus with so many loader processes.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import SIZE, Corpus
from PIL import Image
from stand_in import stand_in_for_torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["BATCH_SIZE", "SEED", "Open"]
__all__ += [
    "open_files",
    "open_files_tuned",
    "open_huggingface",
    "open_litdata",
    "open_mosaicml",
    "open_webdataset",
    "open_webdataset_our_decoder",
    "open_webdataset_tuned",
]

BATCH_SIZE = 128
SEED = 0

Open = Callable[[], Iterable[Tensor]]
"""Opens a loader: what happens from here on is timed."""


def to_bytes(image: Image.Image) -> Tensor:
    """uint8 [C, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [C, H, W] in [0, 1], as ``torchvision.transforms.ToTensor`` gives it."""
    return to_bytes(image).float().div_(255)


def to_floats(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """uint8 batches to float32 in [0, 1]."""
    return (batch.float().div_(255) for batch in batches)


def _decode_bytes(data: bytes) -> Tensor:
    return to_bytes(Image.open(io.BytesIO(data)))


def _decode_bytes_as_ours(data: bytes) -> Tensor:
    from pipeline.images import decode_into

    out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    decode_into(data, out)
    return torch.from_numpy(out).permute(2, 0, 1).contiguous()


def open_webdataset(corpus: Corpus, processes: int) -> Open:
    import webdataset

    def open_() -> Iterator[Tensor]:
        shards = sorted(map(str, corpus.shards.glob("*.tar")))
        samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("png", "cls")
        samples = samples.map_tuple(to_tensor, int).batched(BATCH_SIZE)
        return (images for images, _ in webdataset.WebLoader(samples, batch_size=None, num_workers=processes))

    return open_


def open_webdataset_tuned(corpus: Corpus, processes: int, decode: Callable[[bytes], Tensor] = _decode_bytes) -> Open:
    import webdataset

    decode(next(corpus.files.glob("*/*.png")).read_bytes())  # imports what it needs

    def open_() -> Iterator[Tensor]:
        shards = sorted(map(str, corpus.shards.glob("*.tar")))
        samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).to_tuple("png", "cls")
        samples = samples.map_tuple(decode, int).batched(BATCH_SIZE)
        batches = webdataset.WebLoader(samples, batch_size=None, num_workers=processes)
        return to_floats(images for images, _ in batches)

    return open_


def open_webdataset_our_decoder(corpus: Corpus, processes: int) -> Open:
    return open_webdataset_tuned(corpus, processes, _decode_bytes_as_ours)


class _Files(Dataset[tuple[Tensor, int]]):
    """What ``torchvision.datasets.ImageFolder`` does."""

    def __init__(self, root: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self._transform = transform
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self._samples = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._samples[index]
        with path.open("rb") as file:
            return self._transform(Image.open(file).convert("RGB")), label


def open_files(corpus: Corpus, processes: int) -> Open:
    def open_() -> Iterator[Tensor]:
        files = _Files(corpus.files, to_tensor)
        return (images for images, _ in DataLoader(files, BATCH_SIZE, shuffle=True, num_workers=processes))

    return open_


def open_files_tuned(corpus: Corpus, processes: int) -> Open:
    def open_() -> Iterator[Tensor]:
        files = _Files(corpus.files, to_bytes)
        return to_floats(images for images, _ in DataLoader(files, BATCH_SIZE, shuffle=True, num_workers=processes))

    return open_


def open_huggingface(corpus: Corpus, processes: int) -> Open:
    import datasets

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [to_tensor(image) for image in rows["image"]], "label": rows["label"]}

    def open_() -> Iterator[Tensor]:
        data, cache = str(corpus.files), str(corpus.huggingface)
        rows = datasets.load_dataset("imagefolder", data_dir=data, split="train", cache_dir=cache)
        loader = DataLoader(rows.with_transform(transform), BATCH_SIZE, shuffle=True, num_workers=processes)
        return (batch["image"] for batch in loader)

    return open_


def open_mosaicml(corpus: Corpus, processes: int) -> Open:
    stand_in_for_torchvision()
    import streaming

    class Images(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return to_tensor(sample["image"]), sample["label"]

    streaming.base.util.clean_stale_shared_memory()

    def open_() -> Iterator[Tensor]:
        images = Images(local=str(corpus.mds), shuffle=True, shuffle_seed=SEED, batch_size=BATCH_SIZE)
        return (each for each, _ in DataLoader(images, BATCH_SIZE, num_workers=processes))

    return open_


def open_litdata(corpus: Corpus, processes: int) -> Open:
    import litdata

    class Images(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return to_tensor(Image.open(io.BytesIO(sample["image"]))), sample["label"]

    def open_() -> Iterator[Tensor]:
        images = Images(str(corpus.litdata), shuffle=True, seed=SEED, drop_last=False)
        loader = litdata.StreamingDataLoader(images, batch_size=BATCH_SIZE, num_workers=processes)
        return (each for each, _ in loader)

    return open_
