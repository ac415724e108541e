"""Inception score (1606.03498): are images recognised (one class each), and are all classes there?"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.errors import WorldError

__all__ = ["SPLITS", "InceptionScore"]

SPLITS = 10
"""Parts of the images whose scores are averaged, as in the paper's code."""


class InceptionScore:
    """Grows with the images; keeps two sums for each split, whatever the number of images.

    score of a split = exp(mean of KL(p(y|x) || p(y))),  p(y) = mean of p(y|x) over the split
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], *, num_images: int, num_classes: int) -> None:
        """Of no images yet.

        Args:
            logits: Features [n, d] -> logits [n, num_classes].
            num_images: How many will come; the splits are equal parts of them, in their order.
            num_classes: Classes of the classifier.
        """
        self._logits, self._num_images = logits, num_images
        self.n = 0
        self._probabilities = torch.zeros(SPLITS, num_classes, dtype=torch.float64)
        self._negative_entropy = torch.zeros(SPLITS, dtype=torch.float64)
        self._counts = torch.zeros(SPLITS, dtype=torch.float64)
        self._starts = torch.tensor([i * num_images // SPLITS for i in range(1, SPLITS)])

    def update(self, features: Tensor) -> None:
        """Adds the features of the next images, [n, d]; no more than ``num_images`` in all."""
        log_p = self._logits(features).double().log_softmax(1).cpu()
        assert self.n + len(log_p) <= self._num_images
        split = torch.bucketize(torch.arange(self.n, self.n + len(log_p)), self._starts, right=True)
        p = log_p.exp()
        self._probabilities.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, (p * log_p).sum(1))
        self._counts.index_add_(0, split, torch.ones(len(log_p), dtype=torch.float64))
        self.n += len(log_p)

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits, once all images are there; each needs one at least."""
        assert self.n == self._num_images >= SPLITS, f"{self.n} of {self._num_images} images"
        marginal = self._probabilities / self._counts[:, None]
        divergence = self._negative_entropy / self._counts - torch.special.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))

    def to_tensors(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {
            "n": torch.tensor(self.n),
            "probabilities": self._probabilities,
            "negative_entropy": self._negative_entropy,
            "counts": self._counts,
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the sums that ``to_tensors`` gave.

        Raises:
            WorldError: They are of other splits or classes.
        """
        mine = {name: tensor.shape for name, tensor in self.to_tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != mine:
            raise WorldError("not the sums of an Inception score of this classifier")
        self.n = int(tensors["n"])
        self._probabilities, self._counts = tensors["probabilities"].clone(), tensors["counts"].clone()
        self._negative_entropy = tensors["negative_entropy"].clone()
