"""One measurement of one contender, in a process of its own; ``loader.py`` starts it and reads its line of JSON."""

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import BATCH_SIZE, CONTENDERS, Contender
from corpus import SIZE, Corpus, ensure_format
from processes import ready
from report import version_of
from torch import Tensor


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measures, or writes the contender's format.

    Args:
        arguments: ``contender``; ``corpus``, its fields; ``processes``; ``check``: hold the images against the corpus,
            which costs time; ``write``: write the format and measure nothing.
    """
    torch.set_num_threads(1)
    facts = arguments["corpus"]
    corpus = Corpus(**facts | {"root": Path(facts["root"])})
    contender = CONTENDERS[arguments["contender"]]
    if arguments["write"]:
        ready()
        assert contender.format is not None
        ensure_format(corpus, contender.format)
        return {}
    open_ = contender.prepare(corpus, arguments["processes"])
    gc.collect()
    ready()
    started = time.perf_counter()
    found = _time(contender, corpus, iter(open_()), started, check=arguments["check"])
    return found | {"versions": {name: version_of(name) for name in contender.packages}}


def _time(
    contender: Contender, corpus: Corpus, batches: Iterator[Tensor], started: float, *, check: bool
) -> dict[str, Any]:
    first = next(batches)
    first_seconds = time.perf_counter() - started
    _check_shape(first)
    # The clock starts when a batch has arrived: the first one, or the last one of the untimed epochs.
    untimed = contender.untimed_epochs * (corpus.num_images // BATCH_SIZE) - 1
    for _ in range(untimed):
        next(batches)
    clock = time.perf_counter()
    num_images, total = 0, 0.0
    for batch in batches:
        num_images += len(batch)
        if check:
            total += _sum_of_means(batch)
    seconds = time.perf_counter() - clock
    if check:
        if untimed < 0:
            num_images, total = num_images + len(first), total + _sum_of_means(first)
        _check_images(contender, corpus, num_images, total)
        return {}
    return {
        "images_per_second": num_images / seconds,
        "first_batch_seconds": None if contender.untimed_epochs else first_seconds,
        "epoch_seconds": None if contender.untimed_epochs else first_seconds + seconds,
    }


def _sum_of_means(batch: Tensor) -> float:
    # Not sum(dtype=float64): its copies fragment the heap by 150 MiB, which would count as the loader's memory.
    return float(batch.mean()) * len(batch)


def _check_shape(batch: Tensor) -> None:
    expected = (BATCH_SIZE, 3, SIZE, SIZE)
    if batch.dtype != torch.float32 or batch.shape != expected:
        raise AssertionError(f"gives {batch.dtype} {tuple(batch.shape)} instead of torch.float32 {expected}")


def _check_images(contender: Contender, corpus: Corpus, num_images: int, total: float) -> None:
    """Up to a batch an epoch may be left out or filled up; else all images must have come, with their pixels."""
    epochs = contender.epochs
    if abs(num_images - epochs * corpus.num_images) > epochs * BATCH_SIZE:
        raise AssertionError(f"gives {num_images} images in {epochs} epochs of {corpus.num_images}")
    mean = (total / num_images - contender.low) / (1 - contender.low)
    if abs(mean - corpus.mean) > 0.001 + 0.2 * BATCH_SIZE / corpus.num_images:
        raise AssertionError(f"mean pixel {mean:.4f} instead of {corpus.mean:.4f}")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
