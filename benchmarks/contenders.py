"""The loaders that are compared. Each gives float32 batches [128, 3, 32, 32] of a shuffled pass over the same images.

A contender is a function of (corpus, loader processes) that imports what it needs and returns how to open it, so that
importing and opening can be told apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peers
from corpus import Corpus
from peers import BATCH_SIZE, SEED, Open
from torch import Tensor

__all__ = ["BATCH_SIZE", "CONTENDERS", "OURS", "OURS_IN_ONE_THREAD", "Contender"]

OURS = "ours"
OURS_IN_ONE_THREAD = "ours-one-thread"
_THREADS = 2
_CACHED_EPOCHS = 5


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A loader in one way of using it.

    Attributes:
        title: What the table calls it.
        prepare: Imports, and returns how to open.
        processes: Numbers of loader processes to measure.
        threads: Threads that read and decode where there is no loader process.
        format: The entry of ``corpus.FORMATS`` that it reads; None: made in any case.
        packages: Distributions whose versions belong to the result.
        low: Value of a black pixel; white is 1.
        untimed_epochs: Passes before the clock starts.
        epochs: Passes that are timed.
    """

    title: str
    prepare: Callable[[Corpus, int], Open]
    processes: tuple[int, ...] = (0, 2)
    threads: int = 1
    format: str | None = None
    packages: tuple[str, ...] = ()
    low: float = 0.0
    untimed_epochs: int = 0
    epochs: int = 1


def _ours(corpus: Corpus, processes: int, *, threads: int = _THREADS, epochs: int = 1) -> Open:
    from pipeline.config import DataConfig
    from pipeline.data.loader import Loader
    from pipeline.data.manifest import load_manifest
    from pipeline.data.order import StreamOrder

    def open_() -> Iterator[Tensor]:
        config = DataConfig(
            data=str(corpus.shards), batch_size=BATCH_SIZE, loader_workers=processes, decode_threads=threads
        )
        manifest = load_manifest(config.data)
        order = StreamOrder(
            shard_sizes=manifest.shard_sizes, batch_size=BATCH_SIZE, num_streams=config.num_streams, seed=SEED
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
    return _ours(corpus, processes, epochs=1 + _CACHED_EPOCHS)


def _ours_in_one_thread(corpus: Corpus, processes: int) -> Open:
    return _ours(corpus, processes, threads=1)


_ALL = (0, 1, 2)
CONTENDERS: dict[str, Contender] = {
    OURS_IN_ONE_THREAD: Contender(
        title="ours, first epoch: everything decoded", prepare=_ours_in_one_thread, processes=(0,), low=-1.0
    ),
    OURS: Contender(
        title="ours, first epoch: everything decoded", prepare=_ours, processes=_ALL, threads=_THREADS, low=-1.0
    ),
    "ours-cached": Contender(
        title="ours, later epochs: decoded images kept in memory",
        prepare=_ours_cached,
        processes=_ALL,
        threads=_THREADS,
        low=-1.0,
        untimed_epochs=1,
        epochs=_CACHED_EPOCHS,
    ),
    "webdataset": Contender(
        title="WebDataset as documented (`decode`, to tensor per sample)",
        prepare=peers.open_webdataset,
        packages=("webdataset",),
    ),
    "webdataset-tuned": Contender(
        title="WebDataset tuned (float after batching)", prepare=peers.open_webdataset_tuned, packages=("webdataset",)
    ),
    "webdataset-our-decoder": Contender(
        title="WebDataset tuned, with our PNG decoder",
        prepare=peers.open_webdataset_our_decoder,
        packages=("webdataset", "imagecodecs"),
    ),
    "files": Contender(title="torch `Dataset` over PNG files", prepare=peers.open_files),
    "files-tuned": Contender(
        title="torch `Dataset` over PNG files, float after batching", prepare=peers.open_files_tuned
    ),
    "huggingface": Contender(
        title="Hugging Face `imagefolder`", prepare=peers.open_huggingface, format="huggingface", packages=("datasets",)
    ),
    "mosaicml": Contender(
        title="MosaicML `StreamingDataset`", prepare=peers.open_mosaicml, format="mds", packages=("mosaicml-streaming",)
    ),
    "litdata": Contender(
        title="LitData `StreamingDataset`", prepare=peers.open_litdata, format="litdata", packages=("litdata",)
    ),
}
"""By the name that ``--peers`` takes."""
