"""SVG as text: elements, the marks of a series, and labels that do not overlap."""

import html
from collections.abc import Sequence

__all__ = ["NUM_TONES", "clipped", "dash_of", "element", "mark", "spread", "text_width", "tone_class"]

NUM_TONES = 8
"""Colours of series, in the page's style as classes t0, t1, ...; legible for people who confuse red and green."""

_DASHES = ("", "6 4", "2 3")
_CHARACTER = 6.9
"""Width of a character of the 12 px labels, pixels."""


def element(name: str, text: str = "", *, title: str = "", **attributes: object) -> str:
    """An element as text.

    Args:
        name: Its tag.
        text: What it says; plain text.
        title: Shown when it is pointed at; plain text.
        **attributes: Their values; ``_`` in a name stands for ``-``, ``class_`` for ``class``; empty ones are left out.
    """
    given = {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value != ""}
    written = "".join(f' {key}="{html.escape(value)}"' for key, value in given.items())
    inner = html.escape(text) + (f"<title>{html.escape(title)}</title>" if title else "")
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def tone_class(place: int | None) -> str:
    """The class that gives an element the colour of a series; None: that of the background."""
    return "faint" if place is None else f"t{place % NUM_TONES}"


def dash_of(place: int) -> str:
    """``stroke-dasharray`` of a line: after the last colour they begin anew, with another dash."""
    return _DASHES[place % len(_DASHES)]


def mark(tone: int | None, x: float, y: float, *, title: str = "", size: float = 4.0) -> str:
    """A point of a series: each has a shape beside its colour, a disc, a square, a triangle or a diamond."""
    classes = f"mark {tone_class(tone)}"
    match 0 if tone is None else tone % 4:
        case 0:
            return element("circle", title=title, class_=classes, cx=x, cy=y, r=size)
        case 1:
            side = round(1.8 * size, 1)
            left, top = round(x - side / 2, 1), round(y - side / 2, 1)
            return element("rect", title=title, class_=classes, x=left, y=top, width=side, height=side)
        case 2:
            corners = [(0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)]
        case _:
            corners = [(0.0, -1.35), (1.35, 0.0), (0.0, 1.35), (-1.35, 0.0)]
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return element("polygon", title=title, class_=classes, points=points)


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Moves labels apart: in the order of their places, at least ``gap`` from each other and between the two ends.

    Where there is no room for all of them the gaps shrink.
    """
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda place: places[place])
    moved = [min(max(places[place], low), high) for place in order]
    for later in range(1, len(moved)):
        moved[later] = max(moved[later], moved[later - 1] + gap)
    if moved:
        moved[-1] = min(moved[-1], high)
    for earlier in range(len(moved) - 2, -1, -1):
        moved[earlier] = min(moved[earlier], moved[earlier + 1] - gap)
    result = [0.0] * len(places)
    for place, at in zip(order, moved, strict=True):
        result[place] = round(at, 1)
    return result


def text_width(text: str) -> float:
    """About how wide a label is, pixels."""
    return _CHARACTER * len(text)


def clipped(text: str, width: float) -> str:
    """A label cut to a width, with an ellipsis in place of what is missing."""
    most = max(4, int(width / _CHARACTER))
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
