"""The loaders that are compared. Each gives float32 batches [128, 3, 32, 32] of a shuffled pass over the same images.

A contender is a function of (corpus, loader processes) that imports what it needs and returns how to open it, so that
importing and opening can be told apart.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import SIZE, Corpus
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["BATCH_SIZE", "CONTENDERS", "OURS", "Contender", "Open"]

BATCH_SIZE = 128
OURS = "ours"
_CACHED_EPOCHS = 5
_SEED = 0

Open = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A loader in one way of using it.

    Attributes:
        title: What the table calls it.
        prepare: Imports, and returns how to open.
        processes: Numbers of loader processes to measure.
        format: The entry of ``corpus.FORMATS`` that it reads; None: made in any case.
        packages: Distributions whose versions belong to the result.
        low: Value of a black pixel; white is 1.
        untimed_epochs: Passes before the clock starts.
        epochs: Passes that are timed.
    """

    title: str
    prepare: Callable[[Corpus, int], Open]
    processes: tuple[int, ...] = (0, 2)
    format: str | None = None
    packages: tuple[str, ...] = ()
    low: float = 0.0
    untimed_epochs: int = 0
    epochs: int = 1


def to_bytes(image: Image.Image) -> Tensor:
    """uint8 [C, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [C, H, W] in [0, 1], as ``torchvision.transforms.ToTensor`` gives it."""
    return to_bytes(image).float().div(255)


def to_floats(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """uint8 batches to float32 in [0, 1]."""
    return (batch.float().div(255) for batch in batches)


def _ours(corpus: Corpus, processes: int, epochs: int = 1) -> Open:
    from pipeline.config import DataConfig
    from pipeline.data.loader import Loader
    from pipeline.data.manifest import load_manifest
    from pipeline.data.order import StreamOrder

    def open_() -> Iterator[Tensor]:
        config = DataConfig(data=str(corpus.shards), batch_size=BATCH_SIZE, loader_workers=processes)
        manifest = load_manifest(config.data)
        order = StreamOrder(
            shard_sizes=manifest.shard_sizes, batch_size=BATCH_SIZE, num_streams=config.num_streams, seed=_SEED
        )
        end = epochs * order.batches_per_epoch
        with Loader(
            config.data, manifest, order, config, rank=0, num_workers=1, start_step=0, end_step=end, finish=_as_it_is
        ) as loader:
            for batch in loader:
                yield batch.x_0

    return open_


def _as_it_is(batch: Any) -> Any:
    return batch


def _ours_cached(corpus: Corpus, processes: int) -> Open:
    return _ours(corpus, processes, 1 + _CACHED_EPOCHS)


def _decode_bytes(data: bytes) -> Tensor:
    return to_bytes(Image.open(io.BytesIO(data)))


def _decode_bytes_as_ours(data: bytes) -> Tensor:
    from pipeline.images import decode_into

    out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    decode_into(data, out)
    return torch.from_numpy(out).permute(2, 0, 1).contiguous()


def _webdataset(corpus: Corpus, processes: int) -> Open:
    import webdataset

    def open_() -> Iterator[Tensor]:
        shards = sorted(map(str, corpus.shards.glob("*.tar")))
        samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("png", "cls")
        samples = samples.map_tuple(to_tensor, _as_it_is).batched(BATCH_SIZE)
        return (images for images, _ in webdataset.WebLoader(samples, batch_size=None, num_workers=processes))

    return open_


def _webdataset_tuned(corpus: Corpus, processes: int, decode: Callable[[bytes], Tensor] = _decode_bytes) -> Open:
    import webdataset

    decode(next(corpus.files.glob("*/*.png")).read_bytes())  # imports what it needs

    def open_() -> Iterator[Tensor]:
        shards = sorted(map(str, corpus.shards.glob("*.tar")))
        samples = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).to_tuple("png", "cls")
        samples = samples.map_tuple(decode, int).batched(BATCH_SIZE)
        batches = webdataset.WebLoader(samples, batch_size=None, num_workers=processes)
        return to_floats(images for images, _ in batches)

    return open_


def _webdataset_our_decoder(corpus: Corpus, processes: int) -> Open:
    return _webdataset_tuned(corpus, processes, _decode_bytes_as_ours)


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


def _files(corpus: Corpus, processes: int) -> Open:
    def open_() -> Iterator[Tensor]:
        files = _Files(corpus.files, to_tensor)
        return (images for images, _ in DataLoader(files, BATCH_SIZE, shuffle=True, num_workers=processes))

    return open_


def _files_tuned(corpus: Corpus, processes: int) -> Open:
    def open_() -> Iterator[Tensor]:
        files = _Files(corpus.files, to_bytes)
        return to_floats(images for images, _ in DataLoader(files, BATCH_SIZE, shuffle=True, num_workers=processes))

    return open_


def _huggingface(corpus: Corpus, processes: int) -> Open:
    import datasets

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [to_tensor(image) for image in rows["image"]], "label": rows["label"]}

    def open_() -> Iterator[Tensor]:
        data, cache = str(corpus.files), str(corpus.huggingface)
        rows = datasets.load_dataset("imagefolder", data_dir=data, split="train", cache_dir=cache)
        loader = DataLoader(rows.with_transform(transform), BATCH_SIZE, shuffle=True, num_workers=processes)
        return (batch["image"] for batch in loader)

    return open_


def _mosaicml(corpus: Corpus, processes: int) -> Open:
    import streaming

    class Images(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return to_tensor(sample["image"]), sample["label"]

    streaming.base.util.clean_stale_shared_memory()

    def open_() -> Iterator[Tensor]:
        images = Images(local=str(corpus.mds), shuffle=True, shuffle_seed=_SEED, batch_size=BATCH_SIZE)
        return (each for each, _ in DataLoader(images, BATCH_SIZE, num_workers=processes))

    return open_


def _litdata(corpus: Corpus, processes: int) -> Open:
    import litdata

    class Images(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return to_tensor(Image.open(io.BytesIO(sample["image"]))), sample["label"]

    def open_() -> Iterator[Tensor]:
        images = Images(str(corpus.litdata), shuffle=True, seed=_SEED, drop_last=False)
        loader = litdata.StreamingDataLoader(images, batch_size=BATCH_SIZE, num_workers=processes)
        return (each for each, _ in loader)

    return open_


_ALL = (0, 1, 2)
CONTENDERS: dict[str, Contender] = {
    OURS: Contender(title="ours, first epoch: everything decoded", prepare=_ours, processes=_ALL, low=-1.0),
    "ours-cached": Contender(
        title="ours, later epochs: decoded images kept in memory",
        prepare=_ours_cached,
        processes=_ALL,
        low=-1.0,
        untimed_epochs=1,
        epochs=_CACHED_EPOCHS,
    ),
    "webdataset": Contender(
        title="WebDataset as documented (`decode`, to tensor per sample)", prepare=_webdataset, packages=("webdataset",)
    ),
    "webdataset-tuned": Contender(
        title="WebDataset tuned (float after batching)", prepare=_webdataset_tuned, packages=("webdataset",)
    ),
    "webdataset-our-decoder": Contender(
        title="WebDataset tuned, with our PNG decoder",
        prepare=_webdataset_our_decoder,
        packages=("webdataset", "imagecodecs"),
    ),
    "files": Contender(title="torch `Dataset` over PNG files", prepare=_files),
    "files-tuned": Contender(title="torch `Dataset` over PNG files, float after batching", prepare=_files_tuned),
    "huggingface": Contender(
        title="Hugging Face `imagefolder`", prepare=_huggingface, format="huggingface", packages=("datasets",)
    ),
    "mosaicml": Contender(
        title="MosaicML `StreamingDataset`", prepare=_mosaicml, format="mds", packages=("mosaicml-streaming",)
    ),
    "litdata": Contender(title="LitData `StreamingDataset`", prepare=_litdata, format="litdata", packages=("litdata",)),
}
"""By the name that ``--peers`` takes."""
