"""How much the loss of an image counts, by the signal-to-noise ratio of its step."""

from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import PREDICTIONS

__all__ = ["WEIGHTINGS", "loss_weights"]

WEIGHTINGS: tuple[str, ...] = ("simple", "min-snr")


def loss_weights(
    weighting: str, prediction: str, schedule: NoiseSchedule, t: Tensor, *, gamma: float = 5.0
) -> Tensor | None:
    """Weight of each image's squared error, in the space of what is predicted.

    "simple" leaves every loss as it is. "min-snr" is Hang et al. (2303.09556), Sec. 3.4: one weight of the error of
    x_0, min(SNR, gamma), and what it becomes for other predictions of the same network, with
    SNR = alpha_bar_t / (1 - alpha_bar_t):

        x_0   min(SNR, gamma)
        eps   min(SNR, gamma) / SNR       = min(1, gamma * (1 - alpha_bar_t) / alpha_bar_t)
        v     min(SNR, gamma) / (SNR + 1) = min(alpha_bar_t, gamma * (1 - alpha_bar_t))

    The forms on the right do not divide by what vanishes: they are finite for alpha_bar_t from 0 to 1, both included.

    Args:
        weighting: One of ``WEIGHTINGS``.
        prediction: One of ``PREDICTIONS``.
        schedule: Noise schedule on the device of ``t``.
        t: Step indices, shape [B], int64, in [0, T).
        gamma: Signal-to-noise ratio at which min-snr clamps, above 0.

    Returns:
        float64 [B]; None where every weight is 1.
    """
    assert weighting in WEIGHTINGS, weighting
    assert prediction in PREDICTIONS, prediction
    if weighting == "simple":
        return None
    signal = schedule.alphas_cumprod[t]
    noise = 1 - signal
    if prediction == "eps":
        return (gamma * noise / signal).clamp(max=1)
    if prediction == "v":
        return signal.minimum(gamma * noise)
    return (signal / noise).clamp(max=gamma)
