import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.power_ema import MAX_SIGMA_REL, PowerEma, gamma_of, sigma_rel_of
from pipeline.errors import UserError

WIDTHS = [0.01, 0.05, 0.1, 0.2, 0.279]


def weights_at(step: int) -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(step))


def follow(average: PowerEma, steps: range) -> None:
    model = nn.Linear(2, 3, bias=False)
    for step in steps:
        model.weight.data.copy_(weights_at(step))
        average.update(model, step)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_papers_widths_are_the_papers(sigma_rel: float, gamma: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-4, *WIDTHS, MAX_SIGMA_REL])
def test_the_exponent_solves_the_cubic_and_gives_the_width_back(sigma_rel: float) -> None:
    gamma, s = gamma_of(sigma_rel), sigma_rel**-2
    terms = [gamma**3, 7 * gamma**2, (16 - s) * gamma, 12 - s]
    assert sum(terms) == pytest.approx(0, abs=1e-12 * max(map(abs, terms)))
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    assert gamma > -1e-12


def test_a_width_is_the_standard_deviation_of_its_profile() -> None:
    """Measured on 100,000 points of tau^gamma over [0, 1]."""
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = tau ** gamma_of(0.07)
    density /= density.sum()
    mean = (density * tau).sum()
    assert float((density * (tau - mean) ** 2).sum().sqrt()) == pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, math.nan])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(UserError, match=f"width {sigma_rel} of a power-function average"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_recursion_is_the_integral_of_the_profile_over_the_weights(sigma_rel: float) -> None:
    average, n = PowerEma(nn.Linear(2, 3, bias=False), sigma_rel=sigma_rel), 60
    follow(average, range(n))
    edges = (torch.arange(n + 1, dtype=torch.float64) / n) ** (average.gamma + 1)
    expected = sum(share * weights_at(step).double() for step, share in enumerate(edges.diff()))
    found = average.state_dict()["weight"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_initial_weights_have_no_part_in_it() -> None:
    model = nn.Linear(2, 3, bias=False)
    average = PowerEma(model, sigma_rel=0.1)
    model.weight.data.copy_(weights_at(0))
    average.update(model, 0)
    assert torch.equal(average.state_dict()["weight"], model.weight)


def test_the_share_of_new_weights_keeps_its_digits_late_in_training() -> None:
    """Against the first terms of the binomial series, at a step where 1 - beta is 8e-7."""
    average = PowerEma(nn.Linear(1, 1), sigma_rel=0.1)
    t, g = 10**7, average.gamma + 1
    series = g / t - g * (g - 1) / 2 / t**2 + g * (g - 1) * (g - 2) / 6 / t**3
    assert average.share_at(t - 1) == pytest.approx(series, rel=1e-14)


def test_a_change_of_the_weights_is_half_forgotten_when_its_profile_says() -> None:
    """Weights 0 up to step n and 1 after it: at step m the average is 1 - (n / m)^(gamma + 1)."""
    model = nn.Linear(1, 1, bias=False)
    average, n = PowerEma(model, sigma_rel=0.1), 100
    for step in range(200):
        model.weight.data.fill_(0.0 if step < n else 1.0)
        average.update(model, step)
        m = step + 1
        expected = 1 - (n / m) ** (average.gamma + 1) if m > n else 0.0
        assert float(average.state_dict()["weight"]) == pytest.approx(expected, abs=1e-6)
