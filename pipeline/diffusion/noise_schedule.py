"""How fast an image turns into noise: beta_t and every table derived from it, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.errors import UserError

__all__ = ["MAX_SIGNAL_AT_T", "REFERENCE_T", "SCHEDULES", "NoiseSchedule", "make_schedule"]

SCHEDULES: tuple[str, ...] = ("linear", "cosine", "quadratic", "sigmoid")

# Sampling starts from pure noise, training ends at x_T: what is left of the image there is a gap that no training
# closes. Stable Diffusion's 0.068 is a known flaw (its samples cannot be very dark or very bright, arXiv 2305.08891);
# the quadratic schedule's default range leaves 0.027 and trains well. The line is drawn between the two.
MAX_SIGNAL_AT_T = 0.05

# beta ranges are quoted for this T and scaled by REFERENCE_T / T, which keeps the sum of betas, and with it the
# terminal signal-to-noise ratio, where it was.
REFERENCE_T = 1000

# A beta this close to 1 is a 1 that rounding has moved: alpha_bar would be rounding error instead of zero.
BETA_CEILING = 1 - 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """The tables of one noise schedule, each float64 [T], entry ``t`` for the paper's step t + 1.

    Entries stay float64 until a coefficient is complete (after the square root), then take the dtype of the images.
    """

    betas: Tensor
    """beta_t, in (0, 1)."""
    alphas_cumprod: Tensor
    """alpha_bar_t, the product of 1 - beta up to and with t."""
    alphas_cumprod_prev: Tensor
    """alpha_bar_{t-1}; 1 at t = 0."""
    posterior_variance: Tensor
    """beta_tilde_t, DDPM Eq. 7; 0 at t = 0."""
    posterior_log_variance_clipped: Tensor
    """log beta_tilde_t, its first entry replaced by the second, because log 0 is -inf ("fixed-small")."""
    fixed_large_log_variance: Tensor
    """log beta_t, its first entry replaced by log beta_tilde_1, as the paper's code does ("fixed-large")."""
    posterior_mean_coef_x0: Tensor
    """Factor of x_0 in the posterior mean, DDPM Eq. 7."""
    posterior_mean_coef_xt: Tensor
    """Factor of x_t in the posterior mean, DDPM Eq. 7."""

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """Derives every table from beta.

        Args:
            betas: beta_t, float64 [T], in (0, 1).
        """
        assert betas.dtype == torch.float64
        assert betas.ndim == 1
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        # 1 - alpha_bar without the cancellation that costs the first steps, where alpha_bar is nearly 1, four digits.
        noise = -torch.expm1(torch.log1p(-betas).cumsum(dim=0))
        noise_prev = torch.cat([noise.new_zeros(1), noise[:-1]])

        posterior_variance = betas * noise_prev / noise  # DDPM Eq. 7
        # With a single step there is no second entry; that step gets no noise, so any finite value serves.
        first = posterior_variance[1:2] if len(betas) > 1 else betas
        return cls(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=alphas_cumprod_prev,
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=torch.cat([first, posterior_variance[1:]]).log(),
            fixed_large_log_variance=torch.cat([first, betas[1:]]).log(),
            posterior_mean_coef_x0=betas * alphas_cumprod_prev.sqrt() / noise,
            posterior_mean_coef_xt=(1 - betas).sqrt() * noise_prev / noise,
        )

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.betas)

    @property
    def signal_at_T(self) -> float:
        """sqrt(alpha_bar_T): how much of the image is left in x_T, in (0, 1)."""
        return math.sqrt(float(self.alphas_cumprod[-1]))

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float64 [T]."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same tables on another device."""
        return NoiseSchedule(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def respaced(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """The schedule that visits only some of the steps: Improved DDPM (2102.09672), Sec. 4.

        alpha_bar stays what it was at the kept steps; beta and all that follows from it belong to the longer strides.

        Args:
            timesteps: Distinct steps in ascending order, each in [0, T).

        Returns:
            A schedule with ``len(timesteps)`` steps; its entry k is this schedule's step ``timesteps[k]``.
        """
        if list(timesteps) == list(range(self.T)):
            return self
        alpha_bar = self.alphas_cumprod[torch.as_tensor(timesteps, device=self.betas.device)]
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return NoiseSchedule.from_betas(1 - alpha_bar / alpha_bar_prev)


def make_schedule(
    schedule: str,
    *,
    T: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    cosine_s: float = 0.008,
    max_beta: float = 0.999,
    allow_signal_at_T: bool = False,
) -> NoiseSchedule:
    """Builds a noise schedule by name and refuses one that cannot be trained or sampled.

    With u_t = t / (T - 1) in [0, 1], k = 1000 / T, a = beta_start and b = beta_end:

        linear     beta_t = k * (a + (b - a) * u_t)                               DDPM, Sec. 4
        quadratic  beta_t = k * (sqrt(a) + (sqrt(b) - sqrt(a)) * u_t)^2           DDIM, App. D
        sigmoid    beta_t = k * (a + (b - a) * sigmoid(12 * u_t - 6))             GeoDiff (2203.02923)
        cosine     beta_t = min(1 - f((t + 1) / T) / f(t / T), max_beta)          Improved DDPM, Eq. 17
                   f(u) = cos^2((u + s) / (1 + s) * pi / 2)

    Args:
        schedule: One of ``SCHEDULES``.
        T: Number of steps, at least 1.
        beta_start: First beta at T = 1000, in (0, 1); not used by cosine.
        beta_end: Last beta at T = 1000, in [beta_start, 1); not used by cosine.
        cosine_s: Offset s of the cosine, at least 0; keeps the first betas from vanishing.
        max_beta: Where the cosine's betas are clipped, in (0, 1).
        allow_signal_at_T: Accepts a schedule that leaves more than ``MAX_SIGNAL_AT_T`` of the image in x_T.

    Raises:
        UserError: A value is out of its range, T is too small for the beta range, or x_T keeps too much signal.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    if T < 1:
        raise UserError(f"T={T} is not a number of diffusion steps: use 1 or more (the paper uses 1000)")
    if schedule == "cosine":
        betas = _cosine_betas(T, cosine_s, max_beta)
        remedy = "raise max_beta"
    else:
        betas = _scaled_betas(schedule, T, beta_start, beta_end)
        remedy = "raise beta_end" if T > 1 else "use more steps or the cosine schedule"

    made = NoiseSchedule.from_betas(betas)
    if made.signal_at_T > MAX_SIGNAL_AT_T and not allow_signal_at_T:
        raise UserError(
            f"schedule {schedule!r} with T={T} leaves sqrt(alpha_bar_T)={made.signal_at_T:.3g} of the image in x_T "
            f"(limit {MAX_SIGNAL_AT_T}), but sampling starts from pure noise: {remedy}, or pass --allow-signal-at-T "
            "if this is what you want"
        )
    return made


def _cosine_betas(T: int, s: float, max_beta: float) -> Tensor:
    if not (0 <= s < math.inf and 0 < max_beta < 1):
        raise UserError(f"cosine_s={s} and max_beta={max_beta}: cosine_s must be 0 or more, max_beta inside (0, 1)")
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    if betas[0] <= 0:
        raise UserError(f"cosine with T={T} and cosine_s={s} has beta_0={float(betas[0])}: use fewer steps")
    return betas


def _scaled_betas(schedule: str, T: int, beta_start: float, beta_end: float) -> Tensor:
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"beta_start={beta_start} and beta_end={beta_end}: need 0 < beta_start <= beta_end < 1 "
            "(the paper uses 1e-4 and 0.02)"
        )
    steps = max(T, 2)  # a single step is the first of two: a range needs both of its ends
    if schedule == "quadratic":
        base = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64).square()
    elif schedule == "sigmoid":
        u = torch.linspace(-6, 6, steps, dtype=torch.float64)
        base = beta_start + (beta_end - beta_start) * torch.sigmoid(u)
    else:
        base = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)

    betas = base[:T] * (REFERENCE_T / T)
    if float(betas[-1]) >= BETA_CEILING:
        t = int((betas >= BETA_CEILING).nonzero()[0])
        smallest_T = math.floor(REFERENCE_T * float(base[-1]) / BETA_CEILING) + 1
        raise UserError(
            f"schedule {schedule!r} with T={T} has beta_{t}={float(betas[t]):.4g}, but beta must stay below 1: "
            f"beta_start={beta_start} and beta_end={beta_end} are values for T={REFERENCE_T} and are scaled by "
            f"{REFERENCE_T}/T; use T={smallest_T} or more, a smaller beta_end, or the cosine schedule"
        )
    return betas
