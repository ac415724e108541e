"""Curves as SVG, without any library: what a report shows must need nothing but the file."""

import html
import math
from collections.abc import Sequence

from pipeline.evaluation.report_data import Curve, Point

__all__ = ["COLOURS", "chart", "colour_of"]

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_DASHES = ("", "6 4", "2 3")
_WIDTH, _HEIGHT = 860, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 18, 16, 50


def colour_of(place: int) -> str:
    """The colour of a run; after the last colour they begin anew, with another dash."""
    return COLOURS[place % len(COLOURS)]


def chart(curves: Sequence[Curve], *, title: str) -> str:
    """Distance against step, a line for each run, as an ``<svg>`` element; intervals are bars.

    The distance's axis is logarithmic where the largest is more than ten times the smallest.
    """
    points = [point for curve in curves for point in curve.points]
    x = _Axis([point.step for point in points], _LEFT, _WIDTH - _RIGHT, is_log=False)
    values = [value for point in points for value in (point.value, *(point.interval or ()))]
    is_log = min(values) > 0 and max(values) > 10 * min(values)
    y = _Axis(values, _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    parts = [*_grid(x, y, title + (" (log scale)" if is_log else ""))]
    for place, curve in enumerate(curves):
        parts += _line(curve, place, x, y)
    label = html.escape(f"{title} against optimizer step")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


class _Axis:
    """Numbers to pixels, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_log: bool) -> None:
        self._start, self._end, self._is_log = start, end, is_log
        low, high = (self._scaled(value) for value in (min(values), max(values)))
        room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        self._low, self._high = low - room, high + room

    def at(self, value: float) -> float:
        """The pixel of a number."""
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self, count: int = 6) -> list[float]:
        """Round numbers within the axis."""
        if self._is_log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            candidates = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            raw = (self._high - self._low) / count
            size = 10 ** math.floor(math.log10(raw))
            step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
            candidates = [step * n for n in range(math.floor(self._low / step), math.ceil(self._high / step) + 1)]
        return [c for c in candidates if self._low <= self._scaled(c) <= self._high and c >= 0]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._is_log and value > 0 else 0.0 if self._is_log else float(value)


def _grid(x: _Axis, y: _Axis, title: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y.at(tick)}" y2="{y.at(tick)}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y.at(tick) + 4}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x.ticks():
        parts.append(f'<line class="axis" x1="{x.at(tick)}" x2="{x.at(tick)}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(
            f'<text class="tick" x="{x.at(tick)}" y="{bottom + 19}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="name" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    centre = (_TOP + bottom) / 2
    parts.append(
        f'<text class="name" transform="translate(15 {centre}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(title)}</text>"
    )
    return parts


def _line(curve: Curve, place: int, x: _Axis, y: _Axis) -> list[str]:
    colour, dash = colour_of(place), _DASHES[place // len(COLOURS) % len(_DASHES)]
    path = " ".join(f"{x.at(point.step)},{y.at(point.value)}" for point in curve.points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>']
    for point in curve.points:
        parts += [_bar(point, colour, x, y)] if point.interval else []
        text = f"{curve.run}, step {point.step}: {point.value:.4g}"
        parts.append(
            f'<circle cx="{x.at(point.step)}" cy="{y.at(point.value)}" r="3.5" fill="{colour}">'
            f"<title>{html.escape(text)}</title></circle>"
        )
    return parts


def _bar(point: Point, colour: str, x: _Axis, y: _Axis) -> str:
    assert point.interval is not None
    at, (low, high) = x.at(point.step), (y.at(value) for value in point.interval)
    return (
        f'<path d="M{at} {low}V{high}M{at - 4} {low}h8M{at - 4} {high}h8" stroke="{colour}" stroke-width="1.5" '
        f'fill="none" opacity="0.7"/>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
