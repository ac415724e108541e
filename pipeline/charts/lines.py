"""Lines over a common axis, with their names at their right ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.charts.axis import Axis, is_wide
from pipeline.charts.plot import Frame
from pipeline.charts.svg import clipped, dash_of, element, mark, spread, text_width, tone_class

__all__ = ["Line", "Mark", "line_chart"]

_LABEL_SHARE = 0.34
"""Largest part of a chart's width that names of lines may take."""
_LINE_HEIGHT = 15.0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a line."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    """Drawn as a bar."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series."""

    name: str
    """Shown when a point is pointed at."""
    marks: Sequence[Mark]
    """At least one, by ascending x."""
    tone: int | None = 0
    """Which colour; None: in the background."""
    dash: int = 0
    label: str = ""
    """Written at the right end, if not empty."""
    is_dotted: bool = True
    """Whether points are marked; curves of many points are not."""
    weight: Literal["thin", "normal", "thick"] = "normal"
    end: Literal["", "stopped", "failed"] = ""
    """How it ended; a cross marks the last point."""


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    width: int = 960,
    height: int = 380,
    x_log: bool = False,
    y_log: bool | None = None,
    room: float = 0.06,
) -> str:
    """Lines as an ``<svg>`` element.

    Args:
        lines: At least one; later ones lie above earlier ones.
        x_name: Name and unit of the horizontal axis.
        y_name: Name and unit of the vertical axis.
        width: Of the picture, pixels.
        height: Of the picture, pixels.
        x_log: Whether the horizontal axis is logarithmic.
        y_log: Whether the vertical axis is; None: where the largest value is more than ten times the smallest.
        room: Free part of the horizontal axis beside the data.
    """
    labels = [clipped(line.label, _LABEL_SHARE * width) for line in lines]
    longest = max(map(text_width, labels))
    frame = Frame(width=width, height=height, right=int(longest) + 30 if longest else 16)
    marks = [mark for line in lines for mark in line.marks]
    values = [value for each in marks for value in (each.y, *(each.interval or ()))]
    x = Axis([each.x for each in marks], *frame.x_range, is_log=x_log, room=room)
    y = Axis(values, *frame.y_range, is_log=is_wide(values) if y_log is None else y_log)
    parts = frame.grid(x, y, x_name=x_name, y_name=y_name)
    for line in lines:
        parts += _line(line, x, y)
    parts += _labels(lines, labels, x, y, frame)
    return frame.svg(parts, label=f"{y_name} against {x_name}")


def _line(line: Line, x: Axis, y: Axis) -> list[str]:
    tone = tone_class(line.tone)
    path = " ".join(f"{x.at(each.x)},{y.at(each.y)}" for each in line.marks)
    classes = f"line {line.weight} {tone}"
    dash = dash_of(line.dash)
    parts = [element("polyline", title=line.name, class_=classes, points=path, stroke_dasharray=dash)]
    for each in line.marks:
        parts += [_bar(each.interval, x.at(each.x), y, tone)] if each.interval else []
        if line.is_dotted:
            title = f"{line.name}, {each.x:,.6g}: {each.y:.4g}"
            size = 2.2 if line.weight == "thin" else 3.5
            parts.append(mark(line.tone, x.at(each.x), y.at(each.y), title=title, size=size))
    if line.end:
        at, level = x.at(line.marks[-1].x), y.at(line.marks[-1].y)
        cross = f"M{at - 5} {level - 5}l10 10M{at - 5} {level + 5}l10 -10"
        parts.append(element("path", title=f"{line.name}: {line.end}", class_=f"line normal {tone}", d=cross))
    return parts


def _bar(interval: tuple[float, float], at: float, y: Axis, tone: str) -> str:
    low, high = (y.at(value) for value in interval)
    return element("path", class_=f"line thin {tone}", d=f"M{at} {low}V{high}M{at - 4} {low}h8M{at - 4} {high}h8")


def _labels(lines: Sequence[Line], labels: Sequence[str], x: Axis, y: Axis, frame: Frame) -> list[str]:
    """Names right of the chart at the height of the last point, moved apart; a thin line leads back to it."""
    named = [(line, label) for line, label in zip(lines, labels, strict=True) if label]
    ends = [(x.at(line.marks[-1].x), y.at(line.marks[-1].y)) for line, _ in named]
    bottom, top = frame.y_range
    places = spread([level for _, level in ends], gap=_LINE_HEIGHT, low=top, high=bottom)
    edge = frame.x_range[1]
    parts = []
    for (line, label), (at, level), place in zip(named, ends, places, strict=True):
        tone = tone_class(line.tone)
        leader = f"M{at + 6} {level}L{max(at + 6, edge)} {level}L{edge + 16} {place}"
        parts.append(element("path", class_=f"leader {tone}", d=leader))
        parts.append(
            element("text", label, title=line.name, class_=f"series {tone}", x=edge + 20, y=round(place + 4, 1))
        )
    return parts
