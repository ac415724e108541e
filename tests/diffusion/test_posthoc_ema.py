import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.posthoc_ema import Snapshot, cosines, reconstruct, weighted_sum
from pipeline.diffusion.power_ema import PowerEma, gamma_of
from pipeline.errors import UserError

PAIR = (0.05, 0.10)


def snapshots(count: int, steps: int, widths: tuple[float, ...] = PAIR) -> list[Snapshot]:
    """``count`` checkpoints at equal distances up to ``steps``, with every width."""
    return [Snapshot(steps * (n + 1) // count, width) for n in range(count) for width in widths]


def profile(snapshot: Snapshot, tau: Tensor) -> Tensor:
    """The density of EDM2 Eq. 121 at tau."""
    gamma, t = gamma_of(snapshot.sigma_rel), snapshot.step
    return torch.where(tau <= t, (gamma + 1) / t * (tau / t) ** gamma, 0)


def test_cosines_are_the_integrals_of_the_profiles() -> None:
    """Against the midpoint rule on 300,000 points."""
    some = [Snapshot(100, 0.05), Snapshot(60, 0.05), Snapshot(100, 0.2), Snapshot(59, 0.1), Snapshot(3, 0.27)]
    edges = torch.linspace(0, 100, 300_001, dtype=torch.float64)
    points = torch.stack([profile(snapshot, (edges[1:] + edges[:-1]) / 2) for snapshot in some])
    inner = points @ points.T
    expected = inner / (inner.diag()[:, None] * inner.diag()).sqrt()
    torch.testing.assert_close(cosines(some, some), expected, rtol=1e-6, atol=1e-6)


def test_cosines_depend_on_the_ratio_of_the_steps_alone_whatever_their_size() -> None:
    small, large = snapshots(10, 10), snapshots(10, 10**7)
    torch.testing.assert_close(cosines(small, small), cosines(large, large), rtol=1e-13, atol=0)


@pytest.mark.parametrize("steps", [1000, 10**7])
@pytest.mark.parametrize("width", PAIR)
def test_a_width_that_was_kept_is_its_own_snapshot(width: float, steps: int) -> None:
    found = reconstruct(snapshots(20, steps), Snapshot(steps, width))
    assert found.weights == {Snapshot(steps, width): pytest.approx(1, abs=1e-6)}
    assert found.error < 1e-6


@pytest.mark.parametrize("steps", [1000, 10**7])
@pytest.mark.parametrize(
    ("count", "error"), [(1, 0.047), (2, 0.044), (5, 0.023), (10, 0.0073), (20, 0.0020), (50, 0.00032), (200, 0.00002)]
)
def test_more_checkpoints_bring_a_width_between_the_kept_ones_nearer(count: int, error: float, steps: int) -> None:
    found = reconstruct(snapshots(count, steps), Snapshot(steps, 0.08))
    assert found.error == pytest.approx(error, rel=0.05)
    assert sum(map(abs, found.weights.values())) < 1.5


@pytest.mark.parametrize("count", [1, 3, 30, 300])
@pytest.mark.parametrize("width", [0.02, 0.04, 0.08, 0.15, 0.25])
def test_weights_sum_to_one(width: float, count: int) -> None:
    found = reconstruct(snapshots(count, 10**7), Snapshot(10**7, width))
    assert math.fsum(found.weights.values()) == pytest.approx(1, abs=1e-12)


def test_the_error_is_the_distance_of_the_profiles() -> None:
    """Measured on points of the profiles themselves."""
    wanted, there = Snapshot(100, 0.08), snapshots(4, 100)
    found = reconstruct(there, wanted)
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 4000
    near = sum(weight * profile(snapshot, tau) for snapshot, weight in found.weights.items())
    expected = (near - profile(wanted, tau)).norm() / profile(wanted, tau).norm()
    assert found.error == pytest.approx(float(expected), rel=1e-3)


def test_no_other_weights_of_sum_one_are_nearer() -> None:
    """Nearer than the paper's code, which rescales the free solution, and than any neighbour."""
    wanted, there = Snapshot(1000, 0.03), snapshots(3, 1000)
    found = reconstruct(there, wanted)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200
    basis, target = torch.stack([profile(snapshot, tau) for snapshot in there]), profile(wanted, tau)

    def distance(weights: Tensor) -> float:
        return float((weights / weights.sum() @ basis - target).norm() / target.norm())

    best = torch.tensor([found.weights.get(snapshot, 0.0) for snapshot in there], dtype=torch.float64)
    rescaled = torch.linalg.solve(basis @ basis.T, basis @ target)
    assert distance(best) < 0.95 * distance(rescaled)
    for place in range(len(there)):
        for nudge in (-0.01, 0.01):
            assert distance(best + nudge * torch.eye(len(there), dtype=torch.float64)[place]) > distance(best)


@pytest.mark.parametrize(
    "there",
    [
        [Snapshot(10**7 - n, width) for n in range(50) for width in (0.05, 0.050001, 0.1)],
        [Snapshot(10**7, 0.05)] * 20 + [Snapshot(10**7, 0.1)] * 20,
        [Snapshot(1, 0.05), Snapshot(10**7, 0.05), Snapshot(10**7, 0.1)],
        snapshots(1000, 10**7),
    ],
    ids=["a step apart", "doubled", "the first step", "a thousand checkpoints"],
)
def test_profiles_that_are_nearly_the_same_leave_it_solvable(there: list[Snapshot]) -> None:
    found = reconstruct(there, Snapshot(10**7, 0.08))
    assert found.error < 0.06
    assert math.fsum(found.weights.values()) == pytest.approx(1, abs=1e-9)


def test_snapshots_that_hardly_count_are_left_out() -> None:
    """A narrow average needs the last part of training alone."""
    there = snapshots(100, 10_000)
    found = reconstruct(there, Snapshot(10_000, 0.03))
    assert len({snapshot.step for snapshot in found.weights}) < 45
    assert found.error < 0.0013


def test_a_width_that_no_profile_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"width 0\.3"):
        reconstruct(snapshots(2, 10), Snapshot(10, 0.3))


def test_a_random_walk_of_weights_is_averaged_as_if_the_width_had_been_kept() -> None:
    """200 updates of 10,000 weights: 0.2 % of how far the average is from the last weights, in float32."""
    model, generator = nn.Linear(100, 100, bias=False), torch.Generator().manual_seed(0)
    kept = {width: PowerEma(model, sigma_rel=width) for width in (*PAIR, 0.08)}
    saved: dict[Snapshot, dict[str, Tensor]] = {}
    for step in range(200):
        model.weight.data += torch.randn(100, 100, generator=generator)
        for width, average in kept.items():
            average.update(model, step)
            if (step + 1) % 20 == 0 and width in PAIR:
                saved[Snapshot(step + 1, width)] = {k: v.clone() for k, v in average.state_dict().items()}
    weights = reconstruct(saved, Snapshot(200, 0.08)).weights
    found = weighted_sum((weight, saved[snapshot]) for snapshot, weight in weights.items())["weight"]
    direct = kept[0.08].state_dict()["weight"]
    assert float((found - direct).norm() / (model.weight.detach() - direct).norm()) < 0.002


def test_a_sum_is_exact_keeps_dtypes_and_takes_the_last_integers() -> None:
    def part(value: float, count: int) -> dict[str, Tensor]:
        return {"w": torch.full((2,), value), "count": torch.tensor(count)}

    found = weighted_sum([(1e8, part(1.0, 1)), (-1e8, part(1.0, 2)), (1.0, part(0.25, 3))])
    assert (found["w"].dtype, found["w"].tolist()) == (torch.float32, [0.25, 0.25])
    assert (found["count"].dtype, int(found["count"])) == (torch.int64, 3)


def test_a_sum_changes_no_part_and_holds_one_at_a_time() -> None:
    alive = 0

    class Part(dict[str, Tensor]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def part() -> Part:
        nonlocal alive
        alive += 1
        assert alive <= 2  # the one that is handed over and the one before it
        return Part(w=torch.ones(2, dtype=torch.float64))

    first = {"w": torch.ones(2, dtype=torch.float64)}
    found = weighted_sum([(2.0, first), (3.0, first)])
    assert (found["w"].tolist(), first["w"].tolist()) == ([5.0, 5.0], [1.0, 1.0])
    assert weighted_sum((1.0, part()) for _ in range(5))["w"].tolist() == [5.0, 5.0]
