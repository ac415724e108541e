"""Which steps are visited: no number of them falls off either end."""

import pytest
import torch

from pipeline.diffusion.noise_schedule import make_schedule
from pipeline.diffusion.timesteps import SPACINGS, sampling_timesteps, spaced_timesteps
from pipeline.errors import UserError


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_steps_are_distinct_descending_and_reach_both_ends_for_every_number(spacing: str, schedule: str) -> None:
    for T in (1, 2, 3, 37, 60):
        made = make_schedule(schedule, T=T, allow_signal_at_T=True, beta_start=1e-4, beta_end=1e-3)
        for num_steps in range(1, T + 1):
            steps = spaced_timesteps(made, num_steps, spacing)
            assert len(steps) == num_steps
            assert steps == sorted(set(steps), reverse=True)
            assert steps[0] == T - 1
            assert steps[-1] == (0 if num_steps >= 2 else T - 1)


def test_uniform_is_what_it_always_was() -> None:
    made = make_schedule("linear", T=1000)
    assert spaced_timesteps(made, 50) == sampling_timesteps(1000, 50)


def test_quadratic_steps_are_even_in_the_root_of_t() -> None:
    assert spaced_timesteps(make_schedule("linear", T=1000), 4, "quadratic") == [999, 444, 111, 0]


def test_logsnr_steps_are_even_in_the_logarithm_of_the_signal_to_noise_ratio() -> None:
    made = make_schedule("linear", T=20_000)
    steps = spaced_timesteps(made, 30, "logsnr")
    gaps = made.snr.log()[torch.tensor(steps)].diff()
    assert float(gaps.min()) > 0
    # Early steps of the schedule are coarse in log-SNR: there a whole step is the best that can be had.
    torch.testing.assert_close(gaps[:20], gaps.mean().expand(20), rtol=0.01, atol=0)


def test_an_unknown_spacing_and_too_many_steps_are_refused() -> None:
    made = make_schedule("linear", T=100)
    with pytest.raises(UserError, match="unknown spacing 'karras': use one of uniform, quadratic, logsnr"):
        spaced_timesteps(made, 10, "karras")
    with pytest.raises(UserError, match="num_steps=101 with T=100"):
        spaced_timesteps(made, 101, "logsnr")
