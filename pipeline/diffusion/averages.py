"""All averages of the weights that a run keeps, under the names of their files."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pipeline.diffusion.ema import Ema, WeightAverage, named_tensors
from pipeline.diffusion.power_ema import PowerEma
from pipeline.errors import UserError

__all__ = ["EMA", "Averages", "power_stem"]

EMA = "ema"
"""File stem of the average with a constant decay: what is sampled from unless another is asked for."""


def power_stem(sigma_rel: float) -> str:
    """File stem of a power-function average, ``ema-power-0.050``; another one for every width."""
    short = f"{sigma_rel:.3f}"
    return f"ema-power-{short if float(short) == sigma_rel else repr(sigma_rel)}"


class Averages:
    """The ``Ema`` of a run and the power-function averages beside it, if any; used like one ``Ema``."""

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool, power: Iterable[float] = ()) -> None:
        """Starts all averages at the present weights of ``model``.

        Args:
            model: The model to follow, wrapped or not; the averages live on the devices of its parameters.
            decay: As for ``Ema``.
            warmup: As for ``Ema``.
            power: Relative widths of the power-function averages, each in (0, 0.28).

        Raises:
            UserError: A decay or width is out of range.
        """
        self.ema = Ema(model, decay=decay, warmup=warmup)
        powers = {power_stem(sigma_rel): PowerEma(model, sigma_rel=sigma_rel) for sigma_rel in power}
        self._by_stem: dict[str, WeightAverage] = {EMA: self.ema, **powers}

    def update(self, model: nn.Module, step: int) -> None:
        """Moves all averages towards the weights.

        Args:
            model: The model after its optimizer step, wrapped or not.
            step: Number of updates made before this one, 0 for the first.
        """
        parameters, buffers = named_tensors(model)
        for average in self._by_stem.values():
            average.follow(parameters, buffers, step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Averages and buffers by file stem and name; not copies."""
        return {stem: average.state_dict() for stem, average in self._by_stem.items()}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over what ``tensors`` gave, in place, on any device.

        Raises:
            UserError: An average is missing or unexpected, or its names or shapes are not those of this model.
        """
        if wrong := sorted(tensors.keys() ^ self._by_stem.keys()):
            raise UserError(f"the saved averages are not those of this run: {', '.join(wrong)} in only one of them")
        for stem, average in self._by_stem.items():
            average.load_state_dict(tensors[stem])
