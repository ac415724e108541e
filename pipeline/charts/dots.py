"""Points: a value against a number or a word, and the spread of several measurements of the same thing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.charts.axis import Axis, is_wide, number, tick_text
from pipeline.charts.plot import Frame, Places
from pipeline.charts.svg import clipped, element, mark, spread, text_width, tone_class

__all__ = ["Dot", "Row", "dot_chart", "row_chart"]

_ROW = 24
_MOST_LABELS = 5
_WIDE_ENOUGH = 600
_BOLD = 1.12
"""How much wider bold letters are."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point."""

    x: float | str
    """A number, or one of the words of an axis of words."""
    y: float
    name: str
    tone: int | None = 0
    error: float | None = None
    """Standard error of ``y``, drawn as a bar to both sides."""
    is_best: bool = False
    """Drawn larger, with a ring."""
    label: str = ""
    """Written beside it, if not empty; at most five are."""
    group: str = ""
    """Dots of one group are joined by a thin line."""


def dot_chart(
    dots: Sequence[Dot], *, x_name: str, y_name: str, width: int = 460, height: int = 300, x_log: bool | None = None
) -> str:
    """Points as an ``<svg>`` element.

    Args:
        dots: At least one, all with numbers or all with words as ``x``.
        x_name: Name and unit of the horizontal axis.
        y_name: Name and unit of the vertical axis.
        width: Of the picture, pixels.
        height: Of the picture, pixels.
        x_log: Whether the horizontal axis is logarithmic; None: where the largest is over ten times the smallest.
    """
    frame = Frame(width=width, height=height)
    values = [value for dot in dots for value in (dot.y - (dot.error or 0), dot.y + (dot.error or 0))]
    y = Axis(values, *frame.y_range, is_log=is_wide(values))
    words = list(dict.fromkeys(dot.x for dot in dots if isinstance(dot.x, str)))
    numbers = [dot.x for dot in dots if not isinstance(dot.x, str)]
    if words:
        left, right = frame.x_range
        step = (right - left) / len(words)
        places = {word: round(left + (place + 0.5) * step, 1) for place, word in enumerate(words)}
        axis: Axis | Places = [(at, clipped(word, step)) for word, at in places.items()]
        ats = [places[str(dot.x)] for dot in dots]
    else:
        x = Axis(numbers, *frame.x_range, is_log=is_wide(numbers) if x_log is None else x_log)
        ats = [x.at(value) for value in numbers]
        tried = [(x.at(value), tick_text(value)) for value in sorted(set(numbers))]
        axis = tried if _has_room(tried) else x
    parts = frame.grid(axis, y, x_name=x_name, y_name=y_name)
    parts += _trends(dots, ats, y)
    for dot, at in sorted(zip(dots, ats, strict=True), key=lambda pair: pair[0].is_best):
        parts += _dot(dot, at, y)
    parts += _labels([(dot, at, y.at(dot.y)) for dot, at in zip(dots, ats, strict=True) if dot.label], frame)
    return frame.svg(parts, label=f"{y_name} against {x_name}")


def _has_room(places: Places) -> bool:
    """Whether words fit side by side: numbers that were tried are better ticks than round ones."""
    return all(
        right - left > (text_width(first) + text_width(second)) / 2 + 8
        for (left, first), (right, second) in itertools.pairwise(places)
    )


def _trends(dots: Sequence[Dot], ats: Sequence[float], y: Axis) -> list[str]:
    groups: dict[str, list[tuple[float, float]]] = {}
    tones = {dot.group: dot.tone for dot in dots}
    for dot, at in zip(dots, ats, strict=True):
        if dot.group:
            groups.setdefault(dot.group, []).append((at, y.at(dot.y)))
    return [
        element(
            "polyline",
            class_=f"trend {tone_class(tones[name])}",
            points=" ".join(f"{x},{y}" for x, y in sorted(places)),
        )
        for name, places in groups.items()
        if len(places) > 1
    ]


def _dot(dot: Dot, at: float, y: Axis) -> list[str]:
    parts = []
    if dot.error:
        low, high = y.at(dot.y - dot.error), y.at(dot.y + dot.error)
        parts.append(element("path", class_=f"line thin {tone_class(dot.tone)}", d=f"M{at} {low}V{high}"))
    x_words = dot.x if isinstance(dot.x, str) else f"{dot.x:,.6g}"
    title = f"{dot.name}, {x_words}: {dot.y:.4g}"
    if dot.is_best:
        parts.append(element("circle", class_="ring", cx=at, cy=y.at(dot.y), r=9))
    parts.append(mark(dot.tone, at, y.at(dot.y), title=title, size=4.5))
    return parts


def _labels(named: Sequence[tuple[Dot, float, float]], frame: Frame) -> list[str]:
    """Words beside the points, on the side that has room for them."""
    named = named[:_MOST_LABELS]
    bottom, top = frame.y_range
    levels = spread([level for _, _, level in named], gap=14, low=top + 4, high=bottom - 4)
    parts = []
    for (dot, at, _), level in zip(named, levels, strict=True):
        fits_right = at + 14 + text_width(dot.label) < frame.width
        x, anchor = (at + 13, "start") if fits_right else (at - 13, "end")
        base, classes = round(level + 4, 1), f"series {tone_class(dot.tone)}"
        parts.append(element("text", dot.label, title=dot.name, class_=classes, x=x, y=base, text_anchor=anchor))
    return parts


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements of one thing."""

    name: str
    values: Sequence[float]
    mean: float
    error: float | None
    """Standard error of the mean."""
    note: str = ""
    """Written at the right, such as the mean in digits."""
    tone: int | None = 0
    is_best: bool = False


def row_chart(rows: Sequence[Row], *, x_name: str, width: int = 960) -> str:
    """Rows of dots, each with its mean as a stroke and the standard error as a bar, as an ``<svg>`` element.

    Names stand beside their rows, or above them where the picture is narrow.
    """
    is_narrow = width < _WIDE_ENOUGH
    names = [clipped(row.name, (0.66 if is_narrow else 0.36) * width) for row in rows]
    pitch = 1.9 * _ROW if is_narrow else _ROW
    frame = Frame(
        width=width,
        height=int(pitch * len(rows)) + 62,
        left=10 if is_narrow else int(_BOLD * max(map(text_width, names))) + 14,
        right=10 if is_narrow else int(_BOLD * max(text_width(row.note) for row in rows)) + 20,
        top=8,
        bottom=46,
    )
    values = [value for row in rows for value in (*row.values, *_interval(row))]
    x = Axis(values, *frame.x_range, is_log=is_wide(values), room=0.03)
    bottom, top = frame.y_range
    parts = [
        element("line", class_="grid", x1=x.at(tick), x2=x.at(tick), y1=top, y2=bottom)
        for tick in x.ticks(frame.num_x_ticks)
    ]
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        level = round(top + pitch * (place + 1) - _ROW / 2, 1)
        parts += _words(row, name, level - 17 if is_narrow else level + 4, frame, is_narrow=is_narrow)
        parts += _row(row, level, x)
    parts += frame.x_axis(x, x_name)
    return frame.svg(parts, label=f"{x_name} of each seed")


def _interval(row: Row) -> tuple[float, float]:
    return row.mean - (row.error or 0.0), row.mean + (row.error or 0.0)


def _words(row: Row, name: str, base: float, frame: Frame, *, is_narrow: bool) -> list[str]:
    classes = "label strong" if row.is_best else "label"
    x, anchor = (0, "start") if is_narrow else (frame.left - 10, "end")
    return [
        element("text", name, title=row.name, class_=classes, x=x, y=base, text_anchor=anchor),
        element("text", row.note, class_=classes, x=frame.width - 2, y=base, text_anchor="end"),
    ]


def _row(row: Row, level: float, x: Axis) -> list[str]:
    parts = []
    if row.error:
        low, high = (x.at(value) for value in _interval(row))
        classes, wide = f"band {tone_class(row.tone)}", round(high - low, 1)
        parts.append(element("rect", class_=classes, x=low, y=level - 6, width=wide, height=12, rx=2))
    for value in row.values:
        parts.append(mark(row.tone, x.at(value), level, title=f"{row.name}: {number(value, 4)}", size=3.6))
    if len(row.values) > 1:
        at = x.at(row.mean)
        parts.append(element("line", class_="mean", x1=at, x2=at, y1=level - 8, y2=level + 8))
    return parts
