"""Noise schedules as curves: how much of the image is left at each step."""

import io
from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from pipeline.diffusion.noise_schedule import NoiseSchedule

__all__ = ["draw_schedules"]

_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_DASHES = ("-", "--", ":")


def draw_schedules(schedules: Mapping[str, NoiseSchedule]) -> bytes:
    """Draws alpha_bar and log-SNR against t/T, a curve for each schedule.

    Args:
        schedules: By the name in the legend.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(9.2, 3.7), dpi=100, layout="constrained")
    signal, ratio = figure.subplots(1, 2)
    for place, (name, schedule) in enumerate(schedules.items()):
        look = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)]}
        t = [(step + 1) / schedule.T for step in range(schedule.T)]
        signal.plot(t, _numbers(schedule.alphas_cumprod), label=name, linewidth=2, **look)
        ratio.plot(t, _numbers(schedule.snr.log()), label=name, linewidth=2, **look)
    signal.set_title(r"Signal: $\bar\alpha_t$", fontsize=11)
    ratio.set_title(r"Log signal-to-noise ratio: $\log\,\bar\alpha_t / (1 - \bar\alpha_t)$", fontsize=11)
    ratio.axhline(0, color="#98a2b3", linewidth=0.8)
    for axes in (signal, ratio):
        axes.set_xlabel("t / T")
        axes.set_xlim(0, 1)
        axes.grid(color="#e4e7ec")
        axes.spines[["top", "right"]].set_visible(False)
    signal.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _numbers(table: Tensor) -> list[float]:
    values: list[float] = table.cpu().tolist()
    return values
