"""The forward process, its posterior, what a network may predict and the loss: pure functions, no RNG, no device moves.

Every function takes the schedule on the device of the images, ``t`` as int64 [B] in [0, T) (the paper's t minus 1) and
returns tensors in the dtype of the images.
"""

from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule

__all__ = [
    "PREDICTIONS",
    "as_eps",
    "eps_from_velocity",
    "per_image",
    "predict_eps",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "q_step",
    "simple_loss",
    "target",
    "velocity",
]

PREDICTIONS: tuple[str, ...] = ("eps", "v", "x_0")


def per_image(coefficient: Tensor, like: Tensor) -> Tensor:
    """Makes one number an image multiply whole images.

    The cast comes last: half-precision images must not mean a half-precision square root of 1 - alpha_bar.

    Args:
        coefficient: One finished coefficient an image, float64 [B].
        like: Images, shape [B, C, H, W], whose dtype is taken.

    Returns:
        The coefficients, shape [B, 1, 1, 1], dtype of ``like``.
    """
    return coefficient.to(like.dtype)[:, None, None, None]


def q_step(schedule: NoiseSchedule, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Adds the noise of a single step: a draw from q(x_t | x_{t-1}), DDPM Eq. 2.

        x_t = sqrt(1 - beta_t) * x_{t-1} + sqrt(beta_t) * eps

    Args:
        schedule: Noise schedule on the device of ``x_prev``.
        x_prev: Images at step t - 1 (clean images for t = 0), shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).
        eps: Standard normal noise, shape [B, C, H, W].

    Returns:
        x_t, with the shape and dtype of ``x_prev``.
    """
    beta = schedule.betas[t]
    return per_image((1 - beta).sqrt(), x_prev) * x_prev + per_image(beta.sqrt(), x_prev) * eps


def q_sample(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Noises ``x_0`` to step ``t`` in one jump: a draw from q(x_t | x_0), DDPM Eq. 4.

        x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps

    Args:
        schedule: Noise schedule on the device of ``x_0``.
        x_0: Clean images, shape [B, C, H, W], in [-1, 1].
        t: Step indices, shape [B], int64, in [0, T).
        eps: Standard normal noise, shape [B, C, H, W].

    Returns:
        x_t, with the shape and dtype of ``x_0``.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    return per_image(alpha_bar.sqrt(), x_0) * x_0 + per_image((1 - alpha_bar).sqrt(), x_0) * eps


def q_posterior(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), DDPM Eq. 6-7.

        mean     = sqrt(alpha_bar_{t-1}) * beta_t / (1 - alpha_bar_t) * x_0
                 + sqrt(1 - beta_t) * (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) * x_t
        variance = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) * beta_t

    Args:
        schedule: Noise schedule on the device of ``x_t``.
        x_0: Clean images, known or predicted, shape [B, C, H, W].
        x_t: Images at step ``t``, shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).

    Returns:
        The mean, shape [B, C, H, W]; the variance, shape [B, 1, 1, 1], 0 at t = 0; the log variance, shape
        [B, 1, 1, 1], that of step 1 at t = 0. All in the dtype of ``x_t``.
    """
    mean = per_image(schedule.posterior_mean_coef_x0[t], x_t) * x_0
    mean = mean + per_image(schedule.posterior_mean_coef_xt[t], x_t) * x_t
    variance = per_image(schedule.posterior_variance[t], x_t)
    log_variance = per_image(schedule.posterior_log_variance_clipped[t], x_t)
    return mean, variance, log_variance


def predict_x_0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps_hat: Tensor) -> Tensor:
    """The clean images that ``eps_hat`` implies, DDPM Eq. 15; inverse of ``predict_eps``.

        x_0 = (x_t - sqrt(1 - alpha_bar_t) * eps_hat) / sqrt(alpha_bar_t)

    Args:
        schedule: Noise schedule on the device of ``x_t``.
        x_t: Images at step ``t``, shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).
        eps_hat: Predicted noise, shape [B, C, H, W].

    Returns:
        x_0, not clipped, with the shape and dtype of ``x_t``.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    from_x_t, from_eps = (1 / alpha_bar).sqrt(), (1 / alpha_bar - 1).sqrt()
    return per_image(from_x_t, x_t) * x_t - per_image(from_eps, x_t) * eps_hat


def predict_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """The noise that turned ``x_0`` into ``x_t``: DDPM Eq. 4 solved for eps; inverse of ``predict_x_0``.

        eps = (x_t - sqrt(alpha_bar_t) * x_0) / sqrt(1 - alpha_bar_t)

    Args:
        schedule: Noise schedule on the device of ``x_t``.
        x_t: Images at step ``t``, shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).
        x_0: Clean images, shape [B, C, H, W].

    Returns:
        eps, with the shape and dtype of ``x_t``.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    return (x_t - per_image(alpha_bar.sqrt(), x_t) * x_0) / per_image((1 - alpha_bar).sqrt(), x_t)


def velocity(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The velocity of an image and its noise: Salimans & Ho (2202.00512), App. D.

        v = sqrt(alpha_bar_t) * eps - sqrt(1 - alpha_bar_t) * x_0

    With x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps this is a rotation of (x_0, eps), so it is undone
    without a division: v tells eps where almost nothing of the noise is left, and x_0 where almost nothing else is.

    Args:
        schedule: Noise schedule on the device of ``x_0``.
        x_0: Clean images, shape [B, C, H, W], in [-1, 1].
        t: Step indices, shape [B], int64, in [0, T).
        eps: Standard normal noise, shape [B, C, H, W].

    Returns:
        v, with the shape and dtype of ``x_0``.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    return per_image(alpha_bar.sqrt(), x_0) * eps - per_image((1 - alpha_bar).sqrt(), x_0) * x_0


def eps_from_velocity(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """The noise that ``v`` implies: the rotation of ``velocity`` undone.

        eps = sqrt(alpha_bar_t) * v + sqrt(1 - alpha_bar_t) * x_t

    Args:
        schedule: Noise schedule on the device of ``x_t``.
        x_t: Images at step ``t``, shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).
        v: Velocity, known or predicted, shape [B, C, H, W].

    Returns:
        eps, with the shape and dtype of ``x_t``.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    return per_image(alpha_bar.sqrt(), x_t) * v + per_image((1 - alpha_bar).sqrt(), x_t) * x_t


def target(prediction: str, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the network's output is compared with.

    Args:
        prediction: One of ``PREDICTIONS``.
        schedule: Noise schedule on the device of ``x_0``.
        x_0: Clean images, shape [B, C, H, W], in [-1, 1].
        t: Step indices, shape [B], int64, in [0, T).
        eps: Standard normal noise, shape [B, C, H, W].

    Returns:
        eps, v or x_0, shape [B, C, H, W].
    """
    assert prediction in PREDICTIONS, prediction
    if prediction == "v":
        return velocity(schedule, x_0, t, eps)
    return eps if prediction == "eps" else x_0


def as_eps(prediction: str, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
    """The noise that a prediction of any kind implies: samplers know eps alone.

    Args:
        prediction: One of ``PREDICTIONS``: what the network was trained to predict.
        schedule: Noise schedule of the training, on the device of ``x_t``.
        x_t: Images at step ``t``, shape [B, C, H, W].
        t: Step indices, shape [B], int64, in [0, T).
        predicted: The network's output, shape [B, C, H, W].

    Returns:
        eps_hat, shape [B, C, H, W]; a prediction of eps as it is, others in the dtype of ``x_t``.
    """
    assert prediction in PREDICTIONS, prediction
    if prediction == "eps":
        return predicted
    convert = eps_from_velocity if prediction == "v" else predict_eps
    return convert(schedule, x_t, t, predicted.to(x_t.dtype))


def simple_loss(target: Tensor, predicted: Tensor) -> Tensor:
    """Squared error of each image, averaged over channels and pixels: L_simple (DDPM Eq. 14) for predictions of eps.

    Args:
        target: What was to be predicted (the noise that was added), shape [B, C, H, W].
        predicted: What the network predicted, shape [B, C, H, W].

    Returns:
        One loss an image, shape [B], in the wider of the two dtypes.
    """
    return (target - predicted).square().mean(dim=(1, 2, 3))
