"""An average of any width, after training, from power-function averages of other widths (EDM2, 2312.02696, App. C.3).

An average is an integral of the weights over a profile (``power_ema``). A sum of averages has the sum of their profiles
as its own, so what comes closest to a wanted profile comes closest to the wanted average, whatever the weights were.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.power_ema import gamma_of

__all__ = ["Reconstruction", "Snapshot", "cosines", "reconstruct", "weighted_sum"]

# Keeps the equations solvable when profiles are nearly the same, and weights of opposite sign from growing until they
# amplify the float32 rounding of the snapshots. Up to 400 snapshots of two widths it changes no digit of the error.
_RIDGE = 1e-11

# A snapshot that would count for less is left out, since each one has to be downloaded.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, order=True)
class Snapshot:
    """A power-function average as it was after ``step`` updates."""

    step: int
    """At least 1."""
    sigma_rel: float
    """Relative width."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How an average is put together."""

    weights: Mapping[Snapshot, float]
    """Weight by snapshot, in order of their steps; they sum to 1. Snapshots that hardly count are not in it."""
    error: float
    """Norm of the difference of the profiles, as a part of the wanted profile's norm; below 1e-7 it is rounding."""


def reconstruct(snapshots: Iterable[Snapshot], wanted: Snapshot) -> Reconstruction:
    """The weighted sum of snapshots whose profile is nearest to the wanted one.

    Args:
        snapshots: What there is; at least one.
        wanted: Step and width of the average.

    Raises:
        UserError: A width has no profile.
    """
    candidates = sorted(set(snapshots))
    weights, _ = _least_squares(candidates, wanted)
    kept = [snapshot for snapshot, weight in zip(candidates, weights, strict=True) if abs(weight) >= _NEGLIGIBLE]
    weights, error = _least_squares(kept, wanted)
    return Reconstruction(weights=dict(zip(kept, weights, strict=True)), error=error)


def cosines(a: Sequence[Snapshot], b: Sequence[Snapshot]) -> Tensor:
    """Inner products of power-function profiles, EDM2 Eq. 151, divided by the profiles' norms.

    A profile is p(tau) = (gamma + 1) / t * (tau / t)^gamma on [0, t] (Eq. 121) and 0 after t. With r = t_min / t_max
    and the exponent gamma_late of whichever has the larger t,

        <p_a, p_b>              = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * r^gamma_late / t_max
        <p_a, p_b> / |p_a||p_b| = sqrt((2 gamma_a + 1) (2 gamma_b + 1)) / (gamma_a + gamma_b + 1) * r^(gamma_late + 1/2)

    The second has no large or small factors whatever the steps are: r is at most 1.

    Returns:
        float64 [len(a), len(b)], in [0, 1].
    """
    t_a, gamma_a = (column[:, None] for column in _profiles(a))
    t_b, gamma_b = _profiles(b)
    r = torch.minimum(t_a, t_b) / torch.maximum(t_a, t_b)
    gamma_late = torch.where(t_a > t_b, gamma_a, gamma_b)
    scale = ((2 * gamma_a + 1) * (2 * gamma_b + 1)).sqrt() / (gamma_a + gamma_b + 1)
    return scale * r ** (gamma_late + 0.5)


def _least_squares(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[list[float], float]:
    """Weights w that minimise |p_wanted - sum_i w_i p_i|, EDM2 Alg. 3, and that minimum as a part of |p_wanted|.

    Every profile integrates to 1, so the weights must sum to 1, or a weight that never moved would not be kept. The
    paper's code rescales the solution; here it is a constraint of the fit (by a Lagrange multiplier), which is never
    farther from the wanted profile. Unknowns are x_i = w_i / m_i with m_i = |p_wanted| / |p_i|, since the equations
    then hold cosines alone.
    """
    gram, target = cosines(snapshots, snapshots), cosines(snapshots, [wanted])[:, 0]
    m = _norms([wanted]) / _norms(snapshots)
    factor = torch.linalg.cholesky(gram + _RIDGE * torch.eye(len(snapshots), dtype=torch.float64))
    free, correction = torch.cholesky_solve(torch.stack([target, m], dim=1), factor).unbind(dim=1)
    x = free + correction * (1 - m @ free) / (m @ correction)
    squared_error = 1 - 2 * x @ target + x @ gram @ x
    return (m * x).tolist(), float(squared_error.clamp(min=0).sqrt())


def _norms(snapshots: Sequence[Snapshot]) -> Tensor:
    """|p| = (gamma + 1) / sqrt((2 gamma + 1) t): Eq. 151 of a profile with itself."""
    t, gamma = _profiles(snapshots)
    return (gamma + 1) / ((2 * gamma + 1) * t).sqrt()


def _profiles(snapshots: Sequence[Snapshot]) -> tuple[Tensor, Tensor]:
    t = torch.tensor([snapshot.step for snapshot in snapshots], dtype=torch.float64)
    gamma = torch.tensor([gamma_of(snapshot.sigma_rel) for snapshot in snapshots], dtype=torch.float64)
    return t, gamma


def weighted_sum(parts: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Adds up tensors as they come: one part and a float64 sum are in memory.

    Args:
        parts: Weight and tensors by name; the same names and shapes in all of them.

    Returns:
        The sums by name, in the parts' dtypes. Tensors of integers have no average: those of the last part are taken.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for weight, tensors in parts:
        for name, tensor in tensors.items():
            dtypes[name] = tensor.dtype
            if not tensor.is_floating_point():
                sums[name] = tensor
            elif name not in sums:
                sums[name] = weight * tensor.double()
            else:
                sums[name].add_(tensor, alpha=weight)
    return {name: total.to(dtypes[name]) for name, total in sums.items()}
