"""Distances from features, their uncertainty and their limit, on Gaussians whose true distance is known."""

import pytest
import torch

from pipeline.evaluation.frechet import FrechetReference, frechet_infinity, frechet_standard_error
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance, gaussian_frechet_distance

DIM = 24
MIXING = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)).double() / DIM**0.5
OTHER = MIXING + 0.2 * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)).double() / DIM**0.5


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    statistics.update(features)
    return statistics


def draws(count: int, n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, DIM, generator=generator).double() @ OTHER + 0.1 for _ in range(count)]


REFERENCE = statistics_of(torch.randn(5000, DIM, generator=torch.Generator().manual_seed(2)).double() @ MIXING)


@pytest.mark.parametrize("n", [2, 10, DIM, DIM + 1, 500])
def test_the_distance_from_features_is_that_from_their_statistics(n: int):
    features = draws(1, n)[0]
    expected = frechet_distance(statistics_of(features), REFERENCE)
    assert FrechetReference(REFERENCE).distance(features) == pytest.approx(expected, rel=1e-6)


def test_the_distance_from_a_singular_reference_is_exact_and_that_from_itself_is_zero():
    few, features = draws(1, 12)[0], draws(1, 9)[0]
    to = FrechetReference(statistics_of(few))
    assert to.distance(features) == pytest.approx(
        frechet_distance(statistics_of(features), statistics_of(few)), rel=1e-6
    )
    assert 0 <= to.distance(few) < 1e-6


def test_the_standard_error_is_the_spread_over_independent_draws():
    samples = draws(150, 400)
    distances = torch.tensor([FrechetReference(REFERENCE).distance(x) for x in samples])
    errors = torch.tensor([frechet_standard_error(x, statistics_of(x), REFERENCE) for x in samples[:20]])
    # The spread of 150 draws is known to 6 %; the first order leaves out a few percent more.
    assert float(errors.mean()) == pytest.approx(float(distances.std()), rel=0.25)


def test_the_standard_error_falls_with_the_root_of_the_number_of_images():
    x = draws(1, 1000)[0]
    few, many = statistics_of(x), statistics_of(x.repeat(4, 1))
    ratio = frechet_standard_error(x, few, REFERENCE) / frechet_standard_error(x, many, REFERENCE)
    assert ratio == pytest.approx(2, rel=1e-2)


def test_extrapolation_removes_nearly_all_of_the_bias():
    truth = gaussian_frechet_distance(torch.full((DIM,), 0.1), OTHER.T @ OTHER, REFERENCE.mean, REFERENCE.covariance)
    samples = draws(60, 300)
    biased = sum(FrechetReference(REFERENCE).distance(x) for x in samples) / len(samples)
    extrapolated = sum(frechet_infinity(x, REFERENCE) for x in samples) / len(samples)
    assert biased > 1.3 * truth
    assert abs(extrapolated - truth) < 0.2 * (biased - truth)
