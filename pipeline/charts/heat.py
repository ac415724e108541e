"""A table whose cells are coloured by their numbers."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.charts.axis import is_wide

__all__ = ["Cell", "heat_map"]

# From the largest number to the smallest. Lightness falls all the way: the order shows to everybody, and on paper.
_STOPS = ((237, 246, 203), (168, 221, 181), (78, 179, 196), (34, 108, 172), (8, 48, 107))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands in a cell."""

    text: str
    note: str = ""
    """In small print below it."""
    value: float | None = None
    """What the colour says; None: there is no number."""
    state: Literal["", "stopped", "failed"] = ""
    """Why there is no number."""
    is_best: bool = False


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Cell],
    *,
    row_name: str,
    column_name: str,
) -> str:
    """The table, as HTML; a cell that is not given is empty. The smallest number has the darkest colour."""
    values = [cell.value for cell in cells.values() if cell.value is not None]
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(row)}</th>"
        f"{''.join(_cell(cells.get((row, column)), values) for column in columns)}</tr>"
        for row in rows
    )
    width = f"width:min(100%,{130 + 165 * len(columns)}px);min-width:{80 + 84 * len(columns)}px"
    return (
        f"<div class='scroll'><table class='heat' style='{width}'><thead><tr><td></td>"
        f"<th class='over' colspan='{len(columns)}'>{html.escape(column_name)}</th></tr>"
        f"<tr><th class='corner'>{html.escape(row_name)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell | None, values: Sequence[float]) -> str:
    if cell is None:
        return "<td class='none'></td>"
    text = f"<b>{html.escape(cell.text)}</b>" if cell.text else ""
    note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
    if cell.value is None:
        return f"<td class='{cell.state}'>{text}{note}</td>"
    red, green, blue = _colour(cell.value, values)
    ink = "#fff" if _luminance(red, green, blue) < 0.18 else "#111"
    best = " class='best'" if cell.is_best else ""
    flag = "<i>best</i>" if cell.is_best else ""
    return f"<td{best} style='background:rgb({red},{green},{blue});color:{ink}'>{flag}{text}{note}</td>"


def _colour(value: float, values: Sequence[float]) -> tuple[int, int, int]:
    scale = math.log if is_wide(values) else float
    low, high = scale(min(values)), scale(max(values))
    share = 1.0 if high == low else (high - scale(value)) / (high - low)
    place = share * (len(_STOPS) - 1)
    first = min(int(place), len(_STOPS) - 2)
    red, green, blue = (
        round(a + (place - first) * (b - a)) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True)
    )
    return red, green, blue


def _luminance(red: int, green: int, blue: int) -> float:
    """Relative luminance, WCAG 2."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
