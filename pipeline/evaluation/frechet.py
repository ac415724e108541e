"""More about the Frechet distance: its uncertainty, and what it would be with infinitely many images."""

import math

import torch
from torch import Tensor

from pipeline.evaluation.statistics import FeatureStatistics, covariance_root

__all__ = ["LEVELS", "NORMAL_95", "FrechetReference", "frechet_infinity", "frechet_standard_error"]

NORMAL_95 = 1.959964
"""Half the width of a normal distribution's 95 % interval, in standard deviations."""

LEVELS = 4
"""Sizes of subsets that the extrapolation looks at: all features, halves, thirds, quarters."""


class FrechetReference:
    """One side of many Frechet distances: the factor of its covariance is computed once."""

    def __init__(self, reference: FeatureStatistics) -> None:
        covariance = reference.covariance
        self.mean, self._trace = reference.mean, float(covariance.trace())
        self.root = covariance_root(covariance)
        """F [d, rank] with F F' = covariance."""

    def distance(self, features: Tensor) -> float:
        """Squared Frechet distance of some features from the reference, from the features themselves.

        The singular values of the centred features times the root come from whichever of the two Gram matrices is
        smaller. With fewer features than dimensions that is several times faster than any form by two covariances, and
        no eigenvalue stands for a direction that no feature has.

        Args:
            features: [n, d], at least two.
        """
        x = features.double()
        mean = x.mean(0)
        x = x - mean
        z = x @ self.root / math.sqrt(len(x) - 1)
        gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z
        roots = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        between = (mean - self.mean).square().sum()
        return max(0.0, float(between + x.square().sum() / (len(x) - 1) + self._trace - 2 * roots))


def frechet_standard_error(features: Tensor, generated: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Standard error of the Frechet distance over other draws of the generated images, the reference being fixed.

    The infinitesimal jackknife: to first order each image x adds to the distance

        2 (mean - mean_r)' (x - mean) + (x - mean)' (I - T) (x - mean) - its average,
        T = F (F' S F)^(-1/2) F',  F F' = S_r

    the derivative of FID (1706.08500) Eq. 6, and the error is their spread over sqrt(n). It is what the bootstrap tends
    to with many resamples, for one eigendecomposition instead of hundreds. It says nothing of the bias by n.

    Args:
        features: Of generated images, a random sample of those of ``generated``, [m, d].
        generated: Statistics of all generated images, n of them.
        reference: Statistics of the data set.
    """
    root = covariance_root(reference.covariance)
    values, vectors = torch.linalg.eigh(root.T @ generated.covariance @ root)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    transport = root @ vectors[:, kept] * values[kept].pow(-0.25)  # B [d, rank] with B B' = T
    x = features.double() - generated.mean
    influence = 2 * x @ (generated.mean - reference.mean) + x.square().sum(1) - (x @ transport).square().sum(1)
    return float(influence.std()) / math.sqrt(generated.n)


def frechet_infinity(features: Tensor, reference: FeatureStatistics) -> float:
    """Frechet distance extrapolated to infinitely many generated images: FID-infinity (1911.07023).

    Its bias is nearly proportional to 1/N. The features are cut into 1, 2, 3 and 4 disjoint parts, the distances of the
    parts are averaged, so that every feature counts at each level, and a line over 1/N is fitted: its value at 0.

    Args:
        features: Of generated images in random order, [n, d], at least 8.
        reference: Statistics of the data set; its own bias stays.

    Returns:
        The extrapolated distance; it may be slightly negative where the two are alike.
    """
    to = FrechetReference(reference)
    points = []
    for parts in range(1, LEVELS + 1):
        size = len(features) // parts
        distances = [to.distance(features[i * size : (i + 1) * size]) for i in range(parts)]
        points.append((1 / size, sum(distances) / parts))
    u, value = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    slope = ((u - u.mean()) * value).sum() / (u - u.mean()).square().sum()
    return float(value.mean() - slope * u.mean())
