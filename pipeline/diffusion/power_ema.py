"""Power-function averages of a model's weights (EDM2, arXiv 2312.02696, Sec. 3.1 and App. C.1).

The average after t updates weighs the weights after update tau like tau^gamma. Its width is therefore a fixed part of
the training so far, whatever its length: sigma_rel, the standard deviation of the profile as a part of t.
"""

import math

from torch import nn

from pipeline.diffusion.ema import WeightAverage
from pipeline.errors import UserError

__all__ = ["MAX_SIGMA_REL", "PowerEma", "gamma_of", "sigma_rel_of"]

MAX_SIGMA_REL = 12**-0.5
"""Relative width of the plain mean of all weights, gamma = 0; no wider profile forgets the initial weights."""


def sigma_rel_of(gamma: float) -> float:
    """The relative width of a power-function profile, EDM2 Eq. 123.

        sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)

    Args:
        gamma: Exponent of the profile, at least 0.

    Returns:
        Standard deviation of the profile on [0, t], divided by t; in (0, ``MAX_SIGMA_REL``].
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a given relative width: the inverse of ``sigma_rel_of``, EDM2 Eq. 126.

    The largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s = 0 with s = sigma_rel^-2. With gamma = x - 7/3
    it becomes x^3 + p x + q = 0, whose three roots are real for every width allowed here (Viete's formula).

    Args:
        sigma_rel: Relative width, above 0 and at most ``MAX_SIGMA_REL``.

    Returns:
        gamma, at least 0 (up to rounding).

    Raises:
        UserError: There is no such profile.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise UserError(f"width {sigma_rel} of a power-function average: use a value above 0 and below 0.28")
    s = sigma_rel**-2
    p, q = -s - 1 / 3, 2 / 27 + 4 * s / 3
    angle = math.acos(1.5 * q / p * math.sqrt(-3 / p)) / 3
    return 2 * math.sqrt(-p / 3) * math.cos(angle) - 7 / 3


class PowerEma(WeightAverage):
    """The average with a power-function profile.

    After t updates it is exactly the sum over i of ((i / t)^(gamma + 1) - ((i - 1) / t)^(gamma + 1)) theta(i): the
    integral of Eq. 121's profile over weights that stay constant between updates. The initial weights have no part in
    it.
    """

    def __init__(self, model: nn.Module, *, sigma_rel: float) -> None:
        """Starts an average of relative width ``sigma_rel``. Raises as ``gamma_of``."""
        self.sigma_rel = sigma_rel
        self.gamma = gamma_of(sigma_rel)
        super().__init__(model)

    def share_at(self, step: int) -> float:
        """1 - beta_gamma(t) with beta_gamma(t) = (1 - 1/t)^(gamma + 1) and t = step + 1, EDM2 Eq. 127.

        Args:
            step: Number of updates made before this one.
        """
        # Through the logarithm: late in training beta is so near to 1 that 1 - beta would lose most of its digits.
        return -math.expm1((self.gamma + 1) * math.log1p(-1 / (step + 1))) if step > 0 else 1.0
