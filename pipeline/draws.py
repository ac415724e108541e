"""Random numbers as pure functions of ``(seed, purpose, indices)``. Knows nobody.

Philox is a counter-based generator (Salmon et al., SC 2011): a draw is looked up, not advanced to. Whoever asks for
the noise of step 1,000,000 gets it at once, on any worker, in any order, and a resumed run draws what the unbroken one
would have drawn. No generator state exists that could be lost.

The raw Philox stream is fixed by its definition. Permutations are built on it alone; normal draws use numpy's ziggurat,
which is the same on every machine for one numpy version (the version is part of what a run records).
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

__all__ = ["Purpose", "generator", "integers", "permutation", "standard_normal", "torch_seed", "uniform"]


class Purpose(IntEnum):
    """What a draw is for. The value is part of the Philox key: never renumber, only append."""

    SHARD_ORDER = 1
    IMAGE_ORDER = 2
    FLIP = 3
    TIMESTEP = 4
    NOISE = 5
    INIT = 6
    DROPOUT = 7
    SAMPLE = 8
    SAMPLE_STEP = 9
    SUBSTITUTE = 10
    HOLDOUT = 11
    LABEL_DROPOUT = 12
    SAMPLE_LABEL = 13
    REFERENCE_SAMPLE = 14
    BOUND_TIMESTEP = 15
    BOUND_NOISE = 16
    BOUND_IMAGE = 17
    SHOW_IMAGE = 18
    SHOW_NOISE = 19
    SHOW_STEP = 20
    SWEEP_POINT = 21


def generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """The generator of one draw.

    Args:
        seed: The run's seed, in [0, 2**63).
        purpose: What the numbers are for; different purposes never share numbers.
        indices: Up to three non-negative integers that name the draw, for example ``(step, stream)``.
    """
    return np.random.Generator(_philox(seed, purpose, *indices))


def permutation(n: int, seed: int, purpose: Purpose, *indices: int) -> np.ndarray:
    """A permutation of ``range(n)``, int64 [n].

    Sorts raw 64-bit words instead of calling ``Generator.permutation``: numpy promises the raw stream for ever, but
    not the algorithm on top of it, and an epoch's order must survive an upgrade in the middle of a run.
    """
    words = _philox(seed, purpose, *indices).random_raw(n)
    return np.argsort(words, kind="stable")


def standard_normal(shape: tuple[int, ...], seed: int, purpose: Purpose, *indices: int) -> Tensor:
    """Standard normal draws of the given shape, float32 on the CPU."""
    return torch.from_numpy(generator(seed, purpose, *indices).standard_normal(shape, dtype=np.float32))


def integers(n: int, high: int, seed: int, purpose: Purpose, *indices: int) -> Tensor:
    """Uniform integers in [0, high), int64 [n]. The bias of taking the remainder is below high / 2**64."""
    words = _philox(seed, purpose, *indices).random_raw(n)
    return torch.from_numpy((words % np.uint64(high)).astype(np.int64))


def uniform(n: int, seed: int, purpose: Purpose, *indices: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [n]: the upper 53 bits of raw words, so that none is rounded up to 1."""
    words = _philox(seed, purpose, *indices).random_raw(n)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def torch_seed(seed: int, purpose: Purpose, *indices: int) -> int:
    """A seed in [0, 2**63) for ``torch.manual_seed``, where torch itself must draw (dropout, initial weights)."""
    return int(_philox(seed, purpose, *indices).random_raw() >> np.uint64(1))


def _philox(seed: int, purpose: Purpose, *indices: int) -> np.random.Philox:
    assert len(indices) <= 3, "the Philox counter has three words for indices"
    # Word 0 counts the numbers of one draw, words 1..3 name the draw: draws of up to 2**64 blocks never overlap.
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(indices)] = indices
    return np.random.Philox(counter=counter, key=np.array([seed, int(purpose)], dtype=np.uint64))
