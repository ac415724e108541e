"""Numbers to pixels, and how numbers are written."""

import math
from collections.abc import Sequence

__all__ = ["Axis", "decimals_for", "is_wide", "number", "tick_text"]

_ROOM = 0.06
"""Free part of an axis on each side of the data."""


def is_wide(values: Sequence[float]) -> bool:
    """Whether numbers need a logarithmic axis: all above 0, the largest more than ten times the smallest."""
    return min(values) > 0 and max(values) > 10 * min(values)


class Axis:
    """Numbers to pixels, with round ticks."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, is_log: bool = False, room: float = _ROOM
    ) -> None:
        """An axis over all values, with some room on both sides.

        Args:
            values: What it must hold, at least one; above 0 on a logarithmic axis.
            start: Pixel of the small end.
            end: Pixel of the large end; may be smaller than ``start``.
            is_log: Whether equal ratios are equal distances.
            room: Free part on each side.
        """
        self._start, self._end, self.is_log = start, end, is_log
        low, high = (self._scaled(value) for value in (min(values), max(values)))
        free = room * (high - low) or (0.0 if high > low else 0.5 * abs(high) or 0.5)
        self._low, self._high = low - free, high + free
        self._is_signed = min(values) < 0

    def at(self, value: float) -> float:
        """The pixel of a number."""
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self, count: int = 6) -> list[float]:
        """About ``count`` round numbers within the axis; negative ones only if the data has some."""
        if not self.is_log:
            return self._even(self._low, self._high, count)
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = self._within([digit * 10.0**power for power in powers for digit in digits])
            if 3 <= len(found) <= count + 1:
                return found
        if self._high - self._low < 1:  # Less than a decade.
            return self._even(10**self._low, 10**self._high, count)
        return found[:: math.ceil(len(found) / count)]

    def _even(self, low: float, high: float, count: int) -> list[float]:
        raw = (high - low) / count
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 5, 10, 20) if size * factor >= raw)
        multiples = range(math.floor(low / step), math.ceil(high / step) + 1)
        return self._within([float(f"{step * multiple:.12g}") for multiple in multiples])

    def _within(self, candidates: Sequence[float]) -> list[float]:
        signed = [c for c in candidates if self._is_signed or c >= 0]
        return [c for c in signed if not (self.is_log and c <= 0) and self._low <= self._scaled(c) <= self._high]

    def _scaled(self, value: float) -> float:
        if not self.is_log:
            return float(value)
        return math.log10(value) if value > 0 else 0.0


def number(value: float, decimals: int) -> str:
    """A number with thousands separated and a fixed number of decimals, so that a column of them is aligned."""
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.lstrip("-")


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that show about four digits of a typical number among these."""
    sizes = sorted(abs(value) for value in values if value)
    return min(8, max(0, 3 - math.floor(math.log10(sizes[len(sizes) // 2])))) if sizes else 0


def tick_text(value: float) -> str:
    """A round number in few characters: 1,000, 200k, 3M, 0.05, 1e-5."""
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        scale = 1e3 if letter == "k" else unit
        if size >= unit:
            return f"{value / scale:.4g}{letter}".replace("-", "\N{MINUS SIGN}")
    if size >= 100 or value == int(value):
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return text if exponent else text.replace("-", "\N{MINUS SIGN}")
