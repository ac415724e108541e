"""The forward process, its posterior and the training loss: pure functions, no RNG, no device moves.

Every function takes the schedule on the device of the images, ``t`` as int64 [B] in [0, T) (the paper's t minus 1) and
returns tensors in the dtype of the images.
"""

from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule

__all__ = ["per_image", "predict_eps", "predict_x_0", "q_posterior", "q_sample", "q_step", "simple_loss"]


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


def simple_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_simple of each image, DDPM Eq. 14: the squared error averaged over channels and pixels.

    Args:
        eps: The noise that was added, shape [B, C, H, W].
        eps_hat: The noise the network saw, shape [B, C, H, W].

    Returns:
        One loss an image, shape [B], in the wider of the two dtypes.
    """
    return (eps - eps_hat).square().mean(dim=(1, 2, 3))
