"""What a step minimises: one loss an image, from the images, timesteps, noise and classes of a batch."""

import torch
from torch import Tensor, nn

from pipeline import draws
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import q_sample, simple_loss, target
from pipeline.diffusion.weighting import loss_weights

__all__ = ["hidden_labels", "image_losses"]


def hidden_labels(config: TrainConfig, batch: Batch) -> Tensor | None:
    """The classes that the network is told, some of them hidden: classifier-free guidance (2207.12598), Alg. 1.

    Which are hidden is drawn per stream from (seed, step, stream), so that every number of workers hides the same.

    Args:
        config: Says how many classes there are and what part of the labels is hidden.
        batch: A worker's part of a global batch; with labels unless the model is unconditional.

    Returns:
        int64 [b], hidden ones ``num_classes``, on the CPU; None for an unconditional model.
    """
    if config.model.num_classes == 0:
        return None
    assert batch.labels is not None, "plan() refuses a data set without labels"
    count, purpose = len(batch.labels) // len(batch.streams), draws.Purpose.LABEL_DROPOUT
    drawn = torch.cat([draws.uniform(count, config.seed, purpose, batch.step, stream) for stream in batch.streams])
    return batch.labels.masked_fill(drawn < config.loss.label_dropout, config.model.num_classes)


def image_losses(
    model: nn.Module,
    schedule: NoiseSchedule,
    config: TrainConfig,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """The weighted loss of each image: noise it, let the network predict, compare. Alg. 1 of DDPM, lines 3 to 5.

    Args:
        model: The network in training mode, wrapped or not; called as ``model(x_t, t)``, with classes
            ``model(x_t, t, labels)``.
        schedule: Noise schedule on the device of the images.
        config: What is predicted and how it is weighted.
        x_0: Clean images, float32 [b, C, H, W], in [-1, 1].
        t: Step indices, int64 [b], in [0, T).
        eps: Standard normal noise, float32 [b, C, H, W].
        labels: What ``hidden_labels`` gave, on the device of the images.

    Returns:
        float32 [b], differentiable; float32 also where the network computes in half precision.
    """
    x_t = q_sample(schedule, x_0, t, eps)
    predicted = model(x_t, t) if labels is None else model(x_t, t, labels)
    prediction = config.model.prediction
    losses = simple_loss(target(prediction, schedule, x_0, t, eps), predicted.float())
    weights = loss_weights(config.loss.loss_weighting, prediction, schedule, t, gamma=config.loss.min_snr_gamma)
    return losses if weights is None else losses * weights.float()
