"""The frame that all charts share: where the data lies, its axes and their names."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.charts.axis import Axis, tick_text
from pipeline.charts.svg import clipped, element

__all__ = ["Frame", "Places"]

Places = Sequence[tuple[float, str]]
"""A horizontal axis of words: pixels and what stands there."""

_TICK_WIDTH, _TICK_HEIGHT = 75, 45
"""Room that a tick takes at least, pixels."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a chart's data lies within its picture, pixels."""

    width: int
    height: int
    left: int = 58
    right: int = 16
    top: int = 30
    bottom: int = 46

    @property
    def x_range(self) -> tuple[int, int]:
        """Left and right end of the horizontal axis."""
        return self.left, self.width - self.right

    @property
    def y_range(self) -> tuple[int, int]:
        """Bottom and top of the vertical axis."""
        return self.height - self.bottom, self.top

    @property
    def num_x_ticks(self) -> int:
        """How many ticks the horizontal axis has room for."""
        return max(3, (self.width - self.left - self.right) // _TICK_WIDTH)

    def grid(self, x: Axis | Places, y: Axis, *, x_name: str, y_name: str) -> list[str]:
        """Lines, ticks and names of both axes; the vertical one has its name above it, so that it reads as text."""
        left, right = self.x_range
        parts = []
        for tick in y.ticks(max(2, (self.height - self.top - self.bottom) // _TICK_HEIGHT)):
            at = y.at(tick)
            parts.append(element("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
            parts.append(
                element("text", tick_text(tick), class_="tick", x=left - 8, y=round(at + 4, 1), text_anchor="end")
            )
        title = y_name + (" (log scale)" if y.is_log else "")
        parts.append(element("text", clipped(title, self.width), class_="name", x=0, y=13))
        return parts + self.x_axis(x, x_name)

    def x_axis(self, x: Axis | Places, name: str) -> list[str]:
        """The horizontal axis alone."""
        (left, right), (bottom, _) = self.x_range, self.y_range
        if isinstance(x, Axis):
            places: Places = [(x.at(tick), tick_text(tick)) for tick in x.ticks(self.num_x_ticks)]
            name += " (log scale)" if x.is_log else ""
        else:
            places = x
        parts = [element("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)]
        for at, words in places:
            parts.append(element("line", class_="axis", x1=at, x2=at, y1=bottom, y2=bottom + 5))
            parts.append(element("text", words, class_="tick", x=at, y=bottom + 19, text_anchor="middle"))
        middle = (left + right) / 2
        parts.append(element("text", name, class_="name", x=middle, y=self.height - 6, text_anchor="middle"))
        return parts

    def svg(self, parts: Sequence[str], *, label: str) -> str:
        """The ``<svg>`` element; ``label`` says in words what it shows."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html.escape(label)}" '
            f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
        )
