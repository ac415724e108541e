"""Features that are kept one by one, for metrics that moments do not tell: at most a fixed number of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import WorldError

__all__ = ["MOST_FEATURES", "FeatureSample"]

MOST_FEATURES = 10_000
"""Images whose features are kept, float32: 78 MiB of 2048-d ones. Part of the protocol of what they give."""


class FeatureSample:
    """The features of the first images; those of generated images come in no order, so they are a random sample."""

    def __init__(self, dim: int, *, most: int = MOST_FEATURES) -> None:
        self._dim, self._most = dim, most
        self._parts: list[Tensor] = []
        self._n = 0

    @property
    def features(self) -> Tensor:
        """float32 [n, d], n at most ``most``."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, self._dim)

    def update(self, features: Tensor) -> None:
        """Keeps as many of the features, [n, d], as there is room for."""
        room = self._most - self._n
        if room > 0:
            kept = features[:room].detach().to("cpu", torch.float32, copy=True)
            self._parts.append(kept)
            self._n += len(kept)

    def to_tensors(self) -> dict[str, Tensor]:
        """The features so far."""
        return {"features": self.features}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the features that ``to_tensors`` gave.

        Raises:
            WorldError: They have another length.
        """
        found = tensors.get("features")
        if found is None or found.ndim != 2 or found.shape[1] != self._dim or len(found) > self._most:
            raise WorldError(f"not kept features of length {self._dim}")
        self._parts, self._n = [found], len(found)
