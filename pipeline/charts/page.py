"""The page around the charts: one HTML file for screens, light and dark, and for paper."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.charts.style import STYLE
from pipeline.charts.svg import tone_class

__all__ = ["Column", "document", "figures", "key", "line_key", "picture", "section", "table"]

_LONG = 20
"""Characters of a text that may need several lines."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    is_number: bool = False
    """Numbers are aligned at their right end."""
    is_code: bool = False


def document(title: str, *, header: str, body: str) -> str:
    """The whole page.

    Args:
        title: Plain text.
        header: HTML above the sections.
        body: The sections.
    """
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style></head>"
        f"<body><main><header>{header}</header>{body}</main></body></html>\n"
    )


def section(title: str, content: str, *, lead: str = "") -> str:
    """A part of the page. ``title`` and ``lead`` are plain text; nothing at all if there is no content."""
    if not content:
        return ""
    words = f"<p class='lead'>{html.escape(lead)}</p>" if lead else ""
    return f"<section><h2>{html.escape(title)}</h2>{words}{content}</section>"


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, best: int | None = None, caption: str = ""
) -> str:
    """A table of plain text; ``best`` is the row that is set off. It scrolls by itself where the page is too narrow."""
    classes = [_classes(column, [row[place] for row in rows]) for place, column in enumerate(columns)]
    head = "".join(f"<th{kind}>{html.escape(column.name)}</th>" for column, kind in zip(columns, classes, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f"<td{kind}>{f'<code>{html.escape(text)}</code>' if column.is_code else html.escape(text)}</td>"
            for column, kind, text in zip(columns, classes, row, strict=True)
        )
        lines.append(f"<tr{' class=best' if place == best else ''}>{cells}</tr>")
    below = f"<p class='lead'>{html.escape(caption)}</p>" if caption else ""
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def _classes(column: Column, texts: Sequence[str]) -> str:
    """Long texts get room, or a narrow page would break them after every word."""
    if column.is_number:
        return " class='n'"
    return " class='long'" if max(map(len, texts), default=0) > _LONG else ""


def figures(charts: Sequence[str]) -> str:
    """Small charts side by side, or below each other where the page is narrow."""
    return f"<div class='panels'>{''.join(f'<figure>{chart}</figure>' for chart in charts)}</div>" if charts else ""


def key(names: Sequence[tuple[str, int]], *, is_list: bool = False) -> str:
    """What colours and shapes stand for, in a row or one below the other."""
    items = "".join(
        f"<span><i class='swatch {tone_class(tone)}'></i>{html.escape(name)}</span>" for name, tone in names
    )
    return f"<p class='key{' list' if is_list else ''}'>{items}</p>" if items else ""


def line_key(names: Sequence[tuple[str, int | None, int]]) -> str:
    """What lines stand for: names with their colours and dashes."""
    items = "".join(
        f"<span><i class='stroke {tone_class(tone)} d{dash % 3}'></i>{html.escape(name)}</span>"
        for name, tone, dash in names
    )
    return f"<p class='key'>{items}</p>" if items else ""


def picture(png: bytes, *, alt: str, caption: str) -> str:
    """A picture within the page, with its caption (plain text)."""
    return (
        f"<figure><img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
