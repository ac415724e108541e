"""Kernel distance between two sets of features: KID (1801.01401), the squared maximum mean discrepancy, unbiased."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "Estimate", "block_size", "kernel_distance", "polynomial_mmd"]

BLOCK = 1000
"""Most features of a block, the size of the subsets of the paper."""

_FEWEST_BLOCKS = 10


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over independent blocks."""

    value: float
    standard_error: float


def block_size(n: int) -> int:
    """Size of the blocks that n features are cut into: at least ten of them, so that their spread says something.

    Raises:
        ValueError: Fewer than 20 features: a block needs two.
    """
    if n < 2 * _FEWEST_BLOCKS:
        raise ValueError(f"a kernel distance needs at least {2 * _FEWEST_BLOCKS} features of each set, here are {n}")
    return min(BLOCK, n // _FEWEST_BLOCKS)


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """Kernel distance as the mean over disjoint blocks, each compared with a block of the other set.

    The estimate of a block is unbiased whatever its size, so distances of different numbers of images compare. Blocks
    share no image, so the standard error is that of a mean; overlapping subsets would understate it.

    Args:
        x: Features in random order, [n, d].
        y: Features in random order, [m, d].

    Raises:
        ValueError: Fewer than 20 features in a set.
    """
    n = min(len(x), len(y))
    size = block_size(n)
    blocks = n // size
    values = torch.tensor(
        [polynomial_mmd(x[start : start + size], y[start : start + size]) for start in range(0, blocks * size, size)],
        dtype=torch.float64,
    )
    return Estimate(value=float(values.mean()), standard_error=float(values.std()) / math.sqrt(blocks))


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (a'b / d + 1)^3, unbiased: KID, Sec. 4; MMD, Lemma 6.

    Args:
        x: Features, [n, d].
        y: Features, [m, d].

    Returns:
        The estimate; it may be slightly negative where the sets are alike.
    """
    x, y = x.double(), y.double()
    d = x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1).pow(3)

    def mean_of_pairs(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (len(a) * (len(a) - 1))

    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean())
