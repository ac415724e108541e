"""How much of one set of features lies among the neighbours of the other: fidelity and diversity apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BALL_NEIGHBOURS", "DENSITY_NEIGHBOURS", "Overlap", "overlap"]

BALL_NEIGHBOURS = 3
"""Neighbours that make a ball of precision and recall, as in the paper."""
DENSITY_NEIGHBOURS = 5
"""Neighbours that make a ball of density and coverage, as in the paper."""

_ROWS = 1024
"""Rows of a distance matrix at a time; memory is that times the number of features."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Improved precision and recall (1904.06991), Eq. 1-2; density and coverage (2002.09797), Eq. 3 and 5."""

    precision: float
    """Part of the generated images inside a ball of some real image: they look real. In [0, 1]."""
    recall: float
    """Part of the real images inside a ball of some generated image: they could have been made. In [0, 1]."""
    density: float
    """How many balls of real images a generated image lies in, over k: one outlier moves it less; may exceed 1."""
    coverage: float
    """Part of the real images with a generated image in their ball. In [0, 1]."""


def overlap(
    generated: Tensor, real: Tensor, *, k: int = BALL_NEIGHBOURS, k_density: int = DENSITY_NEIGHBOURS
) -> Overlap:
    """Compares two sets of features by their nearest neighbours.

    The ball of a feature vector reaches to its k-th nearest neighbour in its own set.

    Args:
        generated: Features, [n, d], more than k.
        real: Features, [m, d], more than both k. The values depend on both numbers: compare only equal ones.
        k: Neighbours that make a ball for precision and recall.
        k_density: Neighbours that make a ball for density and coverage.

    Raises:
        ValueError: Too few features.
    """
    # float64: the distance of two equal vectors must not come out at the level of float32's cancellation.
    generated, real = generated.double(), real.double()
    (made_radius,) = _radii(generated, k)
    real_radius, density_radius = _radii(real, k, k_density)
    inside_real, balls = [], []
    reached, nearest = torch.zeros(len(real), dtype=torch.bool), torch.full((len(real),), torch.inf).double()
    for rows, distances in _distances(generated, real):
        inside_real.append((distances <= real_radius).any(1))
        balls.append((distances < density_radius).sum(1))
        reached |= (distances <= made_radius[rows, None]).any(0)
        nearest = torch.minimum(nearest, distances.min(0).values)
    return Overlap(
        precision=_mean(torch.cat(inside_real)),
        recall=_mean(reached),
        density=_mean(torch.cat(balls)) / k_density,
        coverage=_mean(nearest < density_radius),
    )


def _radii(x: Tensor, *ks: int) -> list[Tensor]:
    """Distance of each vector to its k-th nearest neighbour, [n], for each k; the vector itself is its nearest."""
    if len(x) <= max(ks):
        raise ValueError(f"the {max(ks)} nearest neighbours need more than {max(ks)} features, here are {len(x)}")
    nearest = torch.cat([d.topk(max(ks) + 1, dim=1, largest=False).values for _, d in _distances(x, x)])
    return [nearest[:, k] for k in ks]


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of x at a time and their distances to all of y, [up to _ROWS, m]."""
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, torch.cdist(x[rows], y)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
