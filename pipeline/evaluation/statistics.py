"""Means and covariances of features, gathered in any number of pieces, and the Frechet distance between two of them.

Everything is float64. Sums of squares are kept about the mean (Chan, Golub and LeVeque 1983), never about zero: nothing
cancels when the features lie far from zero, and pieces merge in any grouping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import WorldError

__all__ = ["FeatureStatistics", "covariance_root", "frechet_distance", "gaussian_frechet_distance"]


@dataclass(eq=False)
class FeatureStatistics:
    """Count, mean and scatter of feature vectors.

    Equal features in the same pieces and order give equal bits; other pieces or another order agree to rounding.
    """

    n: int
    """Number of feature vectors."""
    mean: Tensor
    """float64 [d]; zero as long as ``n`` is 0."""
    scatter: Tensor
    """Sum over the vectors of ``(x - mean) (x - mean)'``, float64 [d, d]."""

    @classmethod
    def empty(cls, dim: int) -> Self:
        """Statistics of no features of length ``dim``."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divisor n - 1), float64 [d, d].

        Raises:
            ValueError: Of fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, here are {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> None:
        """Adds a batch, in place.

        Args:
            features: float32 or float64 [B, d], on any device; B may be 0.

        Raises:
            ValueError: The features have another shape.
            WorldError: Features are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {list(features.shape)}; give [B, {self.dim}]")
        if len(features) == 0:
            return
        x = features.detach().to("cpu", torch.float64)
        _refuse_non_finite(x)
        batch_mean = x.mean(0)
        delta = batch_mean - self.mean
        n = self.n + len(x)
        # The term for the distance between the two means is one more row: one matrix product instead of two passes.
        between = delta * math.sqrt(self.n * len(x) / n)
        rows = torch.cat([x - batch_mean, between[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean = self.mean + delta * (len(x) / n)
        self.n = n

    def merge(self, other: Self) -> Self:
        """Statistics of both sets of features together; neither is changed.

        Raises:
            ValueError: Their features have different lengths.
        """
        _require_same_dim(self.mean, other.mean)
        n = self.n + other.n
        share = other.n / n if n else 0.0
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter.addr_(delta, delta, alpha=self.n * share)
        return type(self)(n, self.mean + delta * share, scatter)

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics as tensors."""
        return {"n": torch.tensor(self.n), "mean": self.mean.contiguous(), "scatter": self.scatter.contiguous()}

    def to_bytes(self) -> bytes:
        """The statistics as a safetensors file: equal statistics give equal bytes."""
        return safetensors.torch.save(self.to_tensors())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The statistics that ``to_bytes`` wrote.

        Raises:
            WorldError: The bytes are truncated, damaged or something else.
        """
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise WorldError(f"truncated or damaged feature statistics ({len(data)} bytes): {error}") from error
        return cls.from_tensors(tensors)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of ``to_tensors``.

        Raises:
            WorldError: The tensors are something else.
        """
        layout = {key: (value.dtype, value.ndim) for key, value in tensors.items()}
        if layout != _LAYOUT or tensors["scatter"].shape != 2 * tensors["mean"].shape:
            raise WorldError(f"not feature statistics: the file holds {', '.join(sorted(tensors)) or 'nothing'}")
        return cls(int(tensors["n"]), tensors["mean"], tensors["scatter"])


_LAYOUT = {"n": (torch.int64, 0), "mean": (torch.float64, 1), "scatter": (torch.float64, 2)}


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians with the moments of two sets of features: FID (1706.08500) Eq. 6.

    It is biased upwards, the more the fewer the features: compare only distances of equal numbers of images.

    Raises:
        ValueError: The features have different lengths, or one set holds fewer than two.
    """
    _require_same_dim(a.mean, b.mean)
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians: FID (1706.08500) Eq. 6.

        |mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    Args:
        mean_a: [d].
        cov_a: Symmetric, positive semidefinite, [d, d]; singular is fine.
        mean_b: [d].
        cov_b: As ``cov_a``.

    Returns:
        The distance, at least 0, in the square of the features' unit.

    Raises:
        ValueError: Shapes do not match, or a matrix is no covariance (not finite, or a negative eigenvalue).
    """
    mean_a, cov_a, mean_b, cov_b = (x.detach().to("cpu", torch.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    _require_same_dim(mean_a, mean_b)
    _require_covariance(cov_a, mean_a)
    _require_covariance(cov_b, mean_b)
    between = float((mean_a - mean_b).square().sum())
    within = float(cov_a.trace() + cov_b.trace())
    distance = between + within - 2 * _trace_of_root(cov_a, cov_b)
    if distance < -1e-6 * (between + within):
        raise ArithmeticError(f"the Frechet distance came out negative: {distance} at traces of {within}")
    return max(distance, 0.0)


def _trace_of_root(a: Tensor, b: Tensor) -> float:
    """Tr((A B)^(1/2)) of two covariances, without the matrix square root.

    With A = F F' and B = G G' the eigenvalues of A B are those of F' B F (symmetric), and the squares of the singular
    values of F' G.
    """
    root_a, root_b = _cholesky(a), _cholesky(b)
    if root_a is not None and root_b is not None:
        return float(torch.linalg.eigvalsh(root_a.T @ b @ root_a).clamp(min=0).sqrt().sum())
    # Eigenvalues that should be zero come out at rounding level, and their square roots, 1e-8 each, would add up by the
    # thousand. So a singular matrix gets a factor without its null space, and singular values need no square root.
    root_a, root_b = (_thin_root(x) if root is None else root for x, root in ((a, root_a), (b, root_b)))
    return float(torch.linalg.svdvals(root_a.T @ root_b).sum())


def covariance_root(covariance: Tensor) -> Tensor:
    """A factor F [d, rank] with F F' = covariance: Cholesky's if the matrix has full rank, else without its null space.

    Args:
        covariance: Symmetric, positive semidefinite, float64 [d, d].

    Raises:
        ValueError: It has a negative eigenvalue.
    """
    root = _cholesky(covariance)
    return _thin_root(covariance) if root is None else root


def _cholesky(covariance: Tensor) -> Tensor | None:
    """The Cholesky factor L with L L' = covariance, or None if the matrix is singular to working precision."""
    root, info = torch.linalg.cholesky_ex(covariance)
    if int(info) != 0:
        return None
    pivots = root.diagonal().square()
    return root if float(pivots.min()) > _rounding(covariance) * float(pivots.max()) else None


def _thin_root(covariance: Tensor) -> Tensor:
    """A factor F [d, rank] with F F' = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1].clamp(min=0))
    if float(values[0]) < -1e-6 * largest or (largest == 0 and float(values[0]) < 0):
        raise ValueError(f"not a covariance: its eigenvalues go from {float(values[0]):.3g} to {float(values[-1]):.3g}")
    kept = values > _rounding(covariance) * largest
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def _rounding(matrix: Tensor) -> float:
    """Relative size below which an eigenvalue of a float64 matrix cannot be told from zero."""
    return len(matrix) * torch.finfo(torch.float64).eps


def _require_same_dim(mean_a: Tensor, mean_b: Tensor) -> None:
    if mean_a.ndim != 1 or mean_a.shape != mean_b.shape:
        raise ValueError(f"features of different lengths: {list(mean_a.shape)} and {list(mean_b.shape)}")


def _require_covariance(covariance: Tensor, mean: Tensor) -> None:
    if covariance.shape != 2 * mean.shape:
        raise ValueError(f"a covariance of shape {list(covariance.shape)} beside a mean of shape {list(mean.shape)}")
    if not (bool(covariance.isfinite().all()) and bool(mean.isfinite().all())):
        raise ValueError("a mean or covariance is not finite")


def _refuse_non_finite(x: Tensor) -> None:
    bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise WorldError(
            f"the features of {len(bad)} of {len(x)} images are not finite, the first at place {bad[0]} of its batch; "
            "the images or the extractor's weights are damaged"
        )
