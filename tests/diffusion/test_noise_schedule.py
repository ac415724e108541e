"""Schedules and their tables against computations that share no code with them: plain floats and 60-digit decimals."""

import decimal
import math
import re
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.noise_schedule import MAX_SIGNAL_AT_T, SCHEDULES, NoiseSchedule, make_schedule
from pipeline.errors import UserError

TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "fixed_large_log_variance",
    "posterior_mean_coef_x0",
    "posterior_mean_coef_xt",
)


def golden_beta(schedule: str, t: int, T: int, a: float = 1e-4, b: float = 0.02) -> float:
    u = t / (T - 1)
    if schedule == "linear":
        return 1000 / T * ((1 - u) * a + u * b)
    if schedule == "quadratic":
        return 1000 / T * ((1 - u) * math.sqrt(a) + u * math.sqrt(b)) ** 2
    if schedule == "sigmoid":
        return 1000 / T * (a + (b - a) / (1 + math.exp(6 - 12 * u)))

    def f(i: int) -> float:
        return math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - f(t + 1) / f(t), 0.999)


def golden_tables(betas: list[float]) -> dict[str, list[float]]:
    """Every table of DDPM Eq. 4 and 7, step by step in 60 decimal digits."""
    rows: dict[str, list[Decimal]] = {name: [] for name in TABLES}
    with decimal.localcontext(prec=60):
        alpha_bar = Decimal(1)
        for beta in map(Decimal, betas):
            prev, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
            rows["betas"].append(beta)
            rows["alphas_cumprod"].append(alpha_bar)
            rows["alphas_cumprod_prev"].append(prev)
            rows["posterior_variance"].append((1 - prev) / (1 - alpha_bar) * beta)
            rows["posterior_mean_coef_x0"].append(prev.sqrt() * beta / (1 - alpha_bar))
            rows["posterior_mean_coef_xt"].append((1 - beta).sqrt() * (1 - prev) / (1 - alpha_bar))
        variance = rows["posterior_variance"]
        rows["posterior_log_variance_clipped"] = [v.ln() for v in [variance[1], *variance[1:]]]
        rows["fixed_large_log_variance"] = [v.ln() for v in [variance[1], *rows["betas"][1:]]]
        return {name: [float(v) for v in row] for name, row in rows.items()}


@pytest.mark.parametrize("T", [50, 100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_equal_the_formulas_in_plain_python(schedule: str, T: int) -> None:
    betas = make_schedule(schedule, T=T).betas
    expected = torch.tensor([golden_beta(schedule, t, T) for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(betas, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [50, 100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_table_equals_sixty_digit_arithmetic(schedule: str, T: int) -> None:
    made = make_schedule(schedule, T=T)
    golden = golden_tables(made.betas.tolist())
    for name in TABLES:
        expected = torch.tensor(golden[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(made, name), expected, rtol=1e-12, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_tables_of_an_unscaled_linear_schedule_are_those_of_the_paper() -> None:
    made = make_schedule("linear", T=1000)
    assert float(made.betas[0]) == pytest.approx(1e-4, rel=1e-12)
    assert float(made.betas[-1]) == pytest.approx(0.02, rel=1e-12)
    assert made.signal_at_T == pytest.approx(0.00635, abs=5e-6)
    assert float(made.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize(("T", "signal"), [(100, 0.603), (250, 0.282), (500, 0.080), (1000, 0.00635)])
def test_without_scaling_the_signal_left_at_T_depends_on_T(T: int, signal: float) -> None:
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    assert NoiseSchedule.from_betas(betas).signal_at_T == pytest.approx(signal, rel=0.01)


@pytest.mark.parametrize("T", [100, 250, 500, 1000, 2000, 4000])
@pytest.mark.parametrize("schedule", ["linear", "quadratic", "sigmoid"])
def test_the_log_snr_at_T_stays_put_when_T_changes(schedule: str, T: int) -> None:
    made, reference = make_schedule(schedule, T=T), make_schedule(schedule, T=1000)
    assert float(made.snr[-1].log()) == pytest.approx(float(reference.snr[-1].log()), rel=0.1)


def test_the_cosine_meets_its_clip_in_the_last_step_only() -> None:
    betas = make_schedule("cosine", T=1000).betas
    assert float(betas[-1]) == 0.999
    assert float(betas[-2]) < 0.999
    assert float(betas[0]) == pytest.approx(4.13e-5, rel=1e-3)


@pytest.mark.parametrize(("T", "alpha_bar"), [(100, 2.43e-7), (1000, 2.43e-9), (4000, 1.52e-10)])
def test_the_cosine_ends_where_improved_ddpm_ends(T: int, alpha_bar: float) -> None:
    assert float(make_schedule("cosine", T=T).alphas_cumprod[-1]) == pytest.approx(alpha_bar, rel=0.01)


def test_the_quadratic_default_range_is_inside_the_signal_limit() -> None:
    assert make_schedule("quadratic", T=1000).signal_at_T == pytest.approx(0.0271, abs=1e-4)
    assert MAX_SIGNAL_AT_T == 0.05


@given(T=st.integers(21, 1500), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=60, deadline=None)
def test_betas_are_inside_the_unit_interval_and_the_snr_only_falls(T: int, schedule: str) -> None:
    made = make_schedule(schedule, T=T)
    assert made.T == T
    assert bool(((made.betas > 0) & (made.betas < 1)).all())
    assert bool((made.snr.diff() < 0).all())
    for name in TABLES:
        table = getattr(made, name)
        assert table.dtype == torch.float64
        assert table.shape == (T,)
        assert bool(table.isfinite().all())


def test_a_single_step_has_finite_tables() -> None:
    made = make_schedule("cosine", T=1)
    assert made.betas.tolist() == [0.999]
    assert made.posterior_variance.tolist() == [0.0]
    assert made.posterior_log_variance_clipped.tolist() == [math.log(0.999)]
    assert made.fixed_large_log_variance.tolist() == [math.log(0.999)]
    assert float(made.posterior_mean_coef_x0[0]) == pytest.approx(1.0, abs=1e-15)


def test_respacing_keeps_alpha_bar_at_the_kept_steps() -> None:
    made = make_schedule("linear", T=1000)
    kept = [0, 3, 250, 777, 999]
    respaced = made.respaced(kept)
    torch.testing.assert_close(respaced.alphas_cumprod, made.alphas_cumprod[kept], rtol=1e-12, atol=0)
    assert made.respaced(range(1000)) is made


def test_moving_a_schedule_keeps_every_table() -> None:
    made = make_schedule("sigmoid", T=100)
    moved = made.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(made, name)) for name in TABLES)


@given(beta_end=st.floats(0.003, 0.4), schedule=st.sampled_from(["linear", "quadratic", "sigmoid"]))
@settings(max_examples=80, deadline=None)
def test_the_smallest_T_that_a_refusal_names_works_and_one_less_does_not(beta_end: float, schedule: str) -> None:
    with pytest.raises(UserError, match="use T=") as refusal:
        make_schedule(schedule, T=2, beta_end=beta_end)
    smallest = int(re.search(r"use T=(\d+) or more", str(refusal.value))[1])
    assert bool((make_schedule(schedule, T=smallest, beta_end=beta_end, allow_signal_at_T=True).betas < 1).all())
    if smallest > 2:
        with pytest.raises(UserError, match="must stay below 1"):
            make_schedule(schedule, T=smallest - 1, beta_end=beta_end, allow_signal_at_T=True)


@pytest.mark.parametrize("T", [10, 20])
def test_a_T_too_small_for_the_beta_range_is_refused_with_the_smallest_that_works(T: int) -> None:
    with pytest.raises(UserError, match=rf"'linear' with T={T} has beta_\d+=1.*scaled by 1000/T; use T=21 or more"):
        make_schedule("linear", T=T)


@pytest.mark.parametrize("T", [0, -3])
def test_a_T_below_one_is_refused(T: int) -> None:
    with pytest.raises(UserError, match=rf"T={T} is not a number of diffusion steps: use 1 or more"):
        make_schedule("linear", T=T)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown schedule 'cosin': use one of linear, cosine, quadratic, sigmoid"):
        make_schedule("cosin", T=10)


@pytest.mark.parametrize(("start", "end"), [(0.02, 1e-4), (0.0, 0.02), (-1e-4, 0.02), (1e-4, 1.0), (math.nan, 0.02)])
def test_a_beta_range_that_is_reversed_or_outside_is_refused(start: float, end: float) -> None:
    message = f"beta_start={start} and beta_end={end}: need 0 < beta_start <= beta_end < 1"
    with pytest.raises(UserError, match=re.escape(message)):
        make_schedule("linear", T=1000, beta_start=start, beta_end=end)


@pytest.mark.parametrize(("s", "max_beta"), [(-0.1, 0.999), (math.nan, 0.999), (0.008, 1.0), (0.008, 0.0)])
def test_cosine_settings_outside_their_range_are_refused(s: float, max_beta: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"cosine_s={s} and max_beta={max_beta}")):
        make_schedule("cosine", T=1000, cosine_s=s, max_beta=max_beta)


def test_signal_left_at_T_is_refused_unless_allowed() -> None:
    with pytest.raises(UserError, match=r"sqrt\(alpha_bar_T\)=0.279 .*limit 0.05.*raise beta_end.*--allow-signal-at-T"):
        make_schedule("linear", T=1000, beta_end=0.005)
    allowed = make_schedule("linear", T=1000, beta_end=0.005, allow_signal_at_T=True)
    assert allowed.signal_at_T == pytest.approx(0.279, abs=5e-4)


def test_one_linear_step_is_refused_because_it_leaves_the_image() -> None:
    with pytest.raises(UserError, match=r"T=1 leaves sqrt\(alpha_bar_T\)=0.949.*use more steps"):
        make_schedule("linear", T=1)
