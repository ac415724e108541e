"""The exponential moving average of a model's weights: what is sampled from, evaluated and published."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pipeline.errors import UserError

__all__ = ["Ema", "WeightAverage", "named_tensors", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and ``torch.compile``, in whatever order they were put around it.

    Both add a prefix (``module.``, ``_orig_mod.``) to every name. An average that looks weights up by the prefixed name
    finds nothing and silently stays at the initial weights.
    """
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


class WeightAverage(ABC):
    """float32 averages of the parameters, and the latest value of the buffers.

    Buffers are not averaged: they are statistics or constants, and an integer one has no average. Names are those of
    the unwrapped model, so the state loads into a plain model whatever was around the trained one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Starts the average at the present weights of ``model``, wrapped or not, on the devices of its parameters."""
        parameters, buffers = named_tensors(model)
        self._parameters = {name: _float32_copy(tensor) for name, tensor in parameters.items()}
        self._buffers = {name: tensor.detach().clone() for name, tensor in buffers.items()}

    @abstractmethod
    def share_at(self, step: int) -> float:
        """Share of the new weights in update ``step``, in [0, 1]: a function of the step alone, nothing to resume.

        Args:
            step: Number of updates made before this one.
        """

    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the weights: average = (1 - share) * average + share * weights.

        Args:
            model: The model after its optimizer step, wrapped or not.
            step: Number of updates made before this one, 0 for the first.
        """
        self.follow(*named_tensors(model), step)

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], step: int) -> None:
        """``update`` with what ``named_tensors`` gave."""
        weights = [parameters[name].detach().float() for name in self._parameters]
        torch._foreach_lerp_(list(self._parameters.values()), weights, self.share_at(step))
        for name, shadow in self._buffers.items():
            shadow.copy_(buffers[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Averages and buffers by name, the names of ``unwrap(model).state_dict()``; not copies."""
        return {**self._parameters, **self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over averages that ``state_dict`` gave, in place.

        Args:
            state: Tensor by name, on any device.

        Raises:
            UserError: Names or shapes are not those of this model.
        """
        own = self.state_dict()
        unlike = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
        wrong = sorted((own.keys() ^ state.keys()) | unlike)
        if wrong:
            raise UserError(
                f"the averaged weights belong to another architecture: {len(wrong)} tensors are missing, unexpected "
                f"or of another shape, the first is {wrong[0]!r}; build the model with the settings saved beside them"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the averages and buffers into ``model`` (wrapped or not), in its own dtype."""
        parameters, buffers = named_tensors(model)
        targets = {**parameters, **buffers}
        for name, tensor in self.state_dict().items():
            targets[name].copy_(tensor)


class Ema(WeightAverage):
    """The average with a constant decay."""

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool) -> None:
        """Starts the average at the present weights of ``model``.

        Args:
            model: The model to follow, wrapped or not; the averages live on the devices of its parameters.
            decay: Share of the old average that an update keeps, in [0, 1).
            warmup: Whether early updates keep less, see ``decay_at``.

        Raises:
            UserError: ``decay`` is not in [0, 1).
        """
        if not 0 <= decay < 1:
            raise UserError(f"ema decay {decay}: use a value in [0, 1), the paper's is 0.9999")
        super().__init__(model)
        self.decay = decay
        self.warmup = warmup

    def decay_at(self, step: int) -> float:
        """Share of the old average that update ``step`` keeps.

        With warmup, min(decay, (1 + step) / (10 + step)). Without, ``decay``, but 0 in the very first update: the
        average then starts from trained weights, not from the initial ones (the paper's code does the same).

        Args:
            step: Number of updates made before this one.
        """
        if self.warmup:
            return min(self.decay, (1 + step) / (10 + step))
        return self.decay if step > 0 else 0.0

    def share_at(self, step: int) -> float:
        """1 - ``decay_at(step)``."""
        return 1 - self.decay_at(step)


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and saved buffers by name, without what ``torch.compile`` adds to the names of compiled parts."""
    model = unwrap(model)
    saved = model.state_dict().keys()
    parameters: dict[str, Tensor] = {_plain(name): tensor for name, tensor in model.named_parameters()}
    buffers = {_plain(name): tensor for name, tensor in model.named_buffers() if name in saved}
    return parameters, buffers


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _float32_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)
