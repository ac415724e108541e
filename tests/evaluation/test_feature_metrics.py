"""Kernel distance, precision/recall, density/coverage and Inception score, against torch-fidelity and by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import WorldError
from pipeline.evaluation.feature_sample import FeatureSample
from pipeline.evaluation.inception_score import InceptionScore
from pipeline.evaluation.kernel_distance import block_size, kernel_distance, polynomial_mmd
from pipeline.evaluation.neighbours import overlap


def features(n: int, *, dim: int = 16, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


class TestKernelDistance:
    @pytest.mark.parametrize("shift", [0.0, 0.5])
    def test_of_two_sets_is_that_of_torch_fidelity(self, torch_fidelity: Any, shift: float):
        from torch_fidelity.metric_kid import kernel_mmd

        x, y = features(60), features(60, seed=1, shift=shift)
        options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
        expected = kernel_mmd(x.double().numpy(), y.double().numpy(), **options, kid_kernel_poly_coef0=1)
        assert polynomial_mmd(x, y) == pytest.approx(expected, abs=1e-12)

    def test_is_unbiased_for_any_number_of_features(self):
        values = [
            polynomial_mmd(features(5, dim=4, seed=2 * i), features(9, dim=4, seed=2 * i + 1)) for i in range(2000)
        ]
        assert abs(float(np.mean(values))) < 4 * float(np.std(values)) / 2000**0.5

    def test_standard_error_is_the_spread_over_independent_draws(self):
        found = [
            kernel_distance(features(200, seed=2 * i), features(200, seed=2 * i + 1, shift=0.3)) for i in range(150)
        ]
        spread = float(np.std([estimate.value for estimate in found]))
        claimed = float(np.mean([estimate.standard_error for estimate in found]))
        assert claimed == pytest.approx(spread, rel=0.25)

    def test_blocks_are_ten_at_least_and_of_a_thousand_features_at_most(self):
        assert [block_size(n) for n in (20, 199, 2000, 10_000, 50_000)] == [2, 19, 200, 1000, 1000]
        with pytest.raises(ValueError, match="at least 20 features of each set, here are 19"):
            kernel_distance(features(19), features(50))


class TestOverlap:
    @pytest.mark.parametrize("shift", [0.0, 1.0])
    def test_precision_and_recall_are_those_of_torch_fidelity(self, torch_fidelity: Any, shift: float):
        from torch_fidelity.metric_prc import prc_features_to_metric

        generated, real = features(150, seed=3, shift=shift) * 0.8, features(200, seed=4)
        expected = prc_features_to_metric(generated, real, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
        found = overlap(generated, real)
        assert found.precision == pytest.approx(expected["precision"])
        assert found.recall == pytest.approx(expected["recall"])
        assert 0 < found.recall < 1

    def test_rows_in_pieces_give_what_the_whole_matrix_gives(self, monkeypatch: pytest.MonkeyPatch):
        generated, real = features(150, seed=5), features(130, seed=6)
        whole = overlap(generated, real)
        monkeypatch.setattr("pipeline.evaluation.neighbours._ROWS", 7)
        assert overlap(generated, real) == whole

    def test_of_points_on_a_line_by_hand(self):
        """Balls of real points 0, 1, 2, 10 reach 1, 1, 1 and 8 with one neighbour."""
        real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        generated = torch.tensor([[0.5], [5.0], [30.0], [31.0]])
        found = overlap(generated, real, k=1, k_density=1)
        assert found.precision == 2 / 4  # 0.5 lies in two balls, 5 in that of 10, the others in none
        assert found.density == 3 / 4
        assert found.coverage == 3 / 4  # nothing comes nearer to 2 than 1.5
        assert found.recall == 3 / 4  # 10 is 5 away from 5, whose ball reaches 4.5

    def test_of_a_set_with_itself_is_one_even_where_vectors_are_equal(self):
        x = features(40).repeat(4, 1)
        found = overlap(x, x)
        assert (found.precision, found.recall) == (1, 1)

    def test_needs_more_features_than_neighbours(self):
        with pytest.raises(ValueError, match="need more than 5 features, here are 5"):
            overlap(features(10), features(5))


class TestInceptionScore:
    def score(self, logits: torch.Tensor, pieces: int) -> tuple[float, float]:
        score = InceptionScore(lambda x: x, num_images=len(logits), num_classes=logits.shape[1])
        for piece in logits.split(pieces):
            score.update(piece)
        return score.score()

    @pytest.mark.parametrize("pieces", [1, 13, 1000])
    @pytest.mark.parametrize("n", [95, 100])
    def test_is_that_of_torch_fidelity_whatever_the_pieces(self, torch_fidelity: Any, n: int, pieces: int):
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits = 2 * features(n, dim=30)
        expected = isc_features_to_metric(logits, splits=10, shuffle=False)
        mean, std = self.score(logits, pieces)
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)

    def test_of_certain_images_is_the_number_of_their_classes(self):
        logits = 1000 * torch.eye(5).repeat(20, 1)
        assert self.score(logits, 7) == pytest.approx((5, 0))

    def test_continued_from_its_tensors_ends_alike(self):
        logits = features(50, dim=12)
        whole, half = (InceptionScore(lambda x: x, num_images=50, num_classes=12) for _ in range(2))
        whole.update(logits)
        half.update(logits[:20])
        later = InceptionScore(lambda x: x, num_images=50, num_classes=12)
        later.restore({name: tensor.clone() for name, tensor in half.to_tensors().items()})
        later.update(logits[20:])
        assert later.score() == pytest.approx(whole.score(), rel=1e-12)
        with pytest.raises(WorldError, match="of this classifier"):
            InceptionScore(lambda x: x, num_images=50, num_classes=13).restore(half.to_tensors())


class TestFeatureSample:
    def test_keeps_the_first_features_and_no_more(self):
        x, sample = features(30), FeatureSample(16, most=20)
        for part in x.split(7):
            sample.update(part)
        assert torch.equal(sample.features, x[:20])

    def test_continued_from_its_tensors_ends_alike(self):
        x, sample, later = features(30), FeatureSample(16, most=20), FeatureSample(16, most=20)
        sample.update(x[:9])
        later.restore(sample.to_tensors())
        later.update(x[9:])
        assert torch.equal(later.features, x[:20])
        with pytest.raises(WorldError, match="not kept features of length 8"):
            FeatureSample(8).restore(sample.to_tensors())

    def test_does_not_hold_the_callers_memory(self):
        x, sample = features(4), FeatureSample(16)
        sample.update(x)
        x.zero_()
        assert float(sample.features.abs().sum()) > 0
