import numpy as np
import pytest
import torch

from pipeline.errors import WorldError
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance, gaussian_frechet_distance


def _features(n: int, dim: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated features whose variances span four decades."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    decades = torch.logspace(0, -2, dim, dtype=torch.float64)
    return scale * (torch.randn(n, dim, generator=generator, dtype=torch.float64) * decades) @ mixing + shift


def _statistics(*batches: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def _covariance(dim: int, seed: int) -> torch.Tensor:
    return _features(3 * dim, dim, seed=seed).T.cov()


def _distance_by_gram(x: torch.Tensor, y: torch.Tensor) -> float:
    """Exact for any number of rows: the trace of the root is the nuclear norm of the product of the centred rows."""
    x_rows, y_rows = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    between = (x.mean(0) - y.mean(0)).square().sum()
    return float(
        between + x_rows.square().sum() + y_rows.square().sum() - 2 * torch.linalg.svdvals(x_rows @ y_rows.T).sum()
    )


def _assert_same(a: FeatureStatistics, b: FeatureStatistics, *, rtol: float) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=rtol * float(b.mean.abs().max()))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=rtol, atol=rtol * float(b.covariance.abs().max()))


class TestFeatureStatistics:
    def test_mean_and_covariance_are_those_of_all_features_at_once(self):
        x = _features(50, 7, seed=0, shift=3.0)
        statistics = _statistics(x)
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(statistics.covariance, x.T.cov(), rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("sizes", [[50], [1] * 50, [49, 1], [7, 0, 13, 30]])
    def test_chunks_of_any_size_give_the_same_statistics(self, sizes: list[int]):
        x = _features(50, 7, seed=0, shift=3.0)
        _assert_same(_statistics(*x.split(sizes)), _statistics(x), rtol=1e-12)

    def test_merge_in_any_grouping_equals_one_pass(self):
        x = _features(60, 7, seed=1, shift=-5.0)
        a, b, c = (_statistics(part) for part in x.split([10, 1, 49]))
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
            _assert_same(merged, _statistics(x), rtol=1e-12)

    def test_merge_changes_neither_side(self):
        a, b = _statistics(_features(5, 3, seed=2)), _statistics(_features(6, 3, seed=3))
        before = a.to_bytes(), b.to_bytes()
        a.merge(b).update(_features(4, 3, seed=4))
        assert (a.to_bytes(), b.to_bytes()) == before

    def test_merging_with_nothing_keeps_every_bit(self):
        a, nothing = _statistics(_features(5, 3, seed=2)), FeatureStatistics.empty(3)
        assert a.merge(nothing).to_bytes() == nothing.merge(a).to_bytes() == a.to_bytes()
        assert nothing.merge(nothing).to_bytes() == nothing.to_bytes()

    def test_a_mean_a_million_times_the_deviation_does_not_disturb_the_covariance(self):
        x = _features(400, 5, seed=5)
        shift = 2.0**20
        x = (x + shift) - shift  # the deviations that survive the addition; subtracting back is exact
        chunks = (x + shift).split(37)
        merged = _statistics(*chunks[:4]).merge(_statistics(*chunks[4:]))
        scale = float(x.T.cov().abs().max())
        torch.testing.assert_close(merged.covariance, x.T.cov(), rtol=1e-9, atol=1e-9 * scale)

    def test_float32_features_are_summed_in_float64(self):
        x = _features(1000, 4, seed=6).float()
        statistics = _statistics(*x.split(10))
        assert statistics.mean.dtype == statistics.scatter.dtype == torch.float64
        torch.testing.assert_close(statistics.covariance, x.double().T.cov(), rtol=1e-12, atol=1e-14)

    def test_the_same_updates_give_the_same_bits(self):
        chunks = _features(100, 16, seed=7).float().split(30)
        assert _statistics(*chunks).to_bytes() == _statistics(*chunks).to_bytes()

    def test_features_of_another_length_are_refused(self):
        with pytest.raises(ValueError, match=r"features have shape \[2, 4\]; give \[B, 3\]"):
            FeatureStatistics.empty(3).update(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="different lengths"):
            FeatureStatistics.empty(3).merge(FeatureStatistics.empty(4))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_not_finite_are_refused_by_place_and_leave_no_trace(self, value: float):
        statistics, x = _statistics(torch.ones(2, 3)), torch.zeros(4, 3)
        before = statistics.to_bytes()
        x[2, 1] = value
        with pytest.raises(WorldError, match="1 of 4 images are not finite, the first at place 2"):
            statistics.update(x)
        assert statistics.to_bytes() == before

    @pytest.mark.parametrize("n", [0, 1])
    def test_a_covariance_of_fewer_than_two_is_refused(self, n: int):
        with pytest.raises(ValueError, match=f"at least 2 feature vectors, here are {n}"):
            _ = _statistics(torch.ones(n, 3)).covariance

    def test_bytes_bring_every_bit_back_and_can_be_added_to(self):
        x = _features(30, 6, seed=8)
        whole, restored = _statistics(x[:20]), FeatureStatistics.from_bytes(_statistics(x[:20]).to_bytes())
        assert restored.to_bytes() == whole.to_bytes()
        whole.update(x[20:])
        restored.update(x[20:])
        assert restored.to_bytes() == whole.to_bytes()

    def test_bytes_truncated_anywhere_are_refused(self):
        data = _statistics(_features(5, 3, seed=9)).to_bytes()
        for length in range(len(data)):
            with pytest.raises(WorldError, match=f"truncated or damaged feature statistics \\({length} bytes\\)"):
                FeatureStatistics.from_bytes(data[:length])

    def test_a_safetensors_file_of_something_else_is_refused(self):
        import safetensors.torch

        with pytest.raises(WorldError, match="not feature statistics: the file holds weight"):
            FeatureStatistics.from_bytes(safetensors.torch.save({"weight": torch.ones(3)}))


class TestFrechetDistance:
    def test_of_diagonal_gaussians_is_the_sum_over_their_axes(self):
        mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 2.0, 0.5]).double()
        sigma_a, sigma_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double()
        distance = gaussian_frechet_distance(mean_a, sigma_a.square().diag(), mean_b, sigma_b.square().diag())
        assert distance == pytest.approx(1 + 16 + 0 + 1 + 2.25 + 0, abs=1e-12)

    def test_of_commuting_gaussians_is_the_sum_over_their_common_axes(self):
        axes = torch.linalg.qr(_features(9, 9, seed=10)).Q
        sigma_a, sigma_b = torch.linspace(0.1, 3, 9).double(), torch.linspace(2, 0.3, 9).double()
        cov_a, cov_b = axes * sigma_a.square() @ axes.T, axes * sigma_b.square() @ axes.T
        distance = gaussian_frechet_distance(torch.zeros(9), cov_a, torch.zeros(9), cov_b)
        assert distance == pytest.approx(float((sigma_a - sigma_b).square().sum()), abs=1e-10)

    @pytest.mark.parametrize("dim", [2, 33])
    def test_of_gaussians_that_do_not_commute_agrees_with_the_matrix_square_root(self, dim: int):
        linalg = pytest.importorskip("scipy.linalg", reason="the oracle is scipy's sqrtm")
        cov_a, cov_b = _covariance(dim, 11), _covariance(dim, 12)
        root = linalg.sqrtm((cov_a @ cov_b).numpy())
        expected = float(cov_a.trace() + cov_b.trace()) - 2 * np.trace(root).real
        assert gaussian_frechet_distance(torch.zeros(dim), cov_a, torch.zeros(dim), cov_b) == pytest.approx(
            expected, abs=1e-6 * float(cov_a.trace())
        )

    @pytest.mark.parametrize(("n_x", "n_y"), [(20, 30), (64, 65), (30, 400), (400, 500)])
    def test_with_fewer_features_than_dimensions_equals_the_exact_gram_form(self, n_x: int, n_y: int):
        x, y = _features(n_x, 64, seed=13, shift=0.1), _features(n_y, 64, seed=14)
        distance = frechet_distance(_statistics(x), _statistics(y))
        assert distance == pytest.approx(_distance_by_gram(x, y), rel=1e-6)

    def test_between_real_halves_with_fewer_features_than_dimensions_is_exact_although_small(self):
        x = _features(60, 128, seed=15)
        y = x + 1e-3 * _features(60, 128, seed=16)
        distance = frechet_distance(_statistics(x), _statistics(y))
        assert distance == pytest.approx(_distance_by_gram(x, y), rel=1e-6)
        assert 0 < distance < 1e-4 * float(_statistics(x).covariance.trace())

    def test_of_features_with_dead_dimensions_ignores_those(self):
        x, y = _features(100, 8, seed=17), _features(100, 8, seed=18)
        padded_x, padded_y = (torch.cat([z, torch.zeros(100, 5)], 1) for z in (x, y))
        expected = frechet_distance(_statistics(x), _statistics(y))
        assert frechet_distance(_statistics(padded_x), _statistics(padded_y)) == pytest.approx(expected, rel=1e-9)

    def test_between_points_is_their_squared_distance(self):
        zero = torch.zeros(3, 3)
        assert gaussian_frechet_distance(torch.tensor([3.0, 0, 0]), zero, torch.tensor([0, 4.0, 0]), zero) == 25.0

    def test_from_a_point_is_the_squared_distance_of_the_means_plus_the_variance(self):
        cov = _covariance(6, 19)
        distance = gaussian_frechet_distance(torch.ones(6), torch.zeros(6, 6), torch.zeros(6), cov)
        assert distance == pytest.approx(6 + float(cov.trace()), rel=1e-12)

    @pytest.mark.parametrize("n", [16, 200])
    def test_of_identical_statistics_is_zero(self, n: int):
        statistics = _statistics(_features(n, 48, seed=20, shift=2.0))
        distance = frechet_distance(statistics, statistics)
        assert 0 <= distance < 1e-9 * float(statistics.covariance.trace())

    @pytest.mark.parametrize("n", [16, 200])
    def test_of_a_translation_is_its_squared_length(self, n: int):
        x = _features(n, 48, seed=21)
        shift = torch.linspace(-1, 1, 48).double()
        expected = float(shift.square().sum())
        assert frechet_distance(_statistics(x), _statistics(x + shift)) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("n", [16, 200])
    def test_is_symmetric(self, n: int):
        a, b = _statistics(_features(n, 48, seed=22)), _statistics(_features(300, 48, seed=23))
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    @pytest.mark.parametrize("n", [16, 200])
    def test_grows_with_the_square_of_the_scale(self, n: int, scale: float):
        x, y = _features(n, 48, seed=24), _features(n, 48, seed=25, shift=0.2)
        expected = scale**2 * frechet_distance(_statistics(x), _statistics(y))
        assert frechet_distance(_statistics(scale * x), _statistics(scale * y)) == pytest.approx(expected, rel=1e-9)

    def test_of_statistics_in_pieces_equals_that_of_statistics_in_one(self):
        x, y = _features(200, 32, seed=26), _features(200, 32, seed=27)
        pieces = _statistics(*x[:100].split(9)).merge(_statistics(*x[100:].split(31)))
        assert frechet_distance(pieces, _statistics(y)) == pytest.approx(
            frechet_distance(_statistics(x), _statistics(y)), rel=1e-9
        )

    def test_of_different_dimensions_is_refused(self):
        with pytest.raises(ValueError, match=r"different lengths: \[3\] and \[4\]"):
            frechet_distance(FeatureStatistics.empty(3), FeatureStatistics.empty(4))
        with pytest.raises(ValueError, match=r"covariance of shape \[2, 2\] beside a mean of shape \[3\]"):
            gaussian_frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(2))

    @pytest.mark.parametrize("cov", [torch.diag(torch.tensor([1.0, -0.1])), -torch.eye(2)])
    def test_of_a_matrix_with_negative_eigenvalues_is_refused(self, cov: torch.Tensor):
        with pytest.raises(ValueError, match="not a covariance: its eigenvalues go from"):
            gaussian_frechet_distance(torch.zeros(2), cov, torch.zeros(2), torch.eye(2))

    def test_of_a_covariance_that_is_not_finite_is_refused(self):
        with pytest.raises(ValueError, match="not finite"):
            gaussian_frechet_distance(torch.zeros(2), torch.eye(2) * float("nan"), torch.zeros(2), torch.eye(2))
