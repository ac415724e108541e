"""The page around the charts: one HTML file for screens, light and dark, and for paper."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.charts.style import STYLE
from pipeline.charts.svg import tone_class

__all__ = ["Column", "document", "figures", "key", "picture", "section", "table"]


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
    head = "".join(f"<th{_classes(column)}>{html.escape(column.name)}</th>" for column in columns)
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f"<td{_classes(column)}>{f'<code>{html.escape(text)}</code>' if column.is_code else html.escape(text)}</td>"
            for column, text in zip(columns, row, strict=True)
        )
        lines.append(f"<tr{' class=best' if place == best else ''}>{cells}</tr>")
    below = f"<p class='lead'>{html.escape(caption)}</p>" if caption else ""
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def _classes(column: Column) -> str:
    return " class='n'" if column.is_number else ""


def figures(charts: Sequence[str]) -> str:
    """Small charts side by side, or below each other where the page is narrow."""
    return f"<div class='panels'>{''.join(f'<figure>{chart}</figure>' for chart in charts)}</div>" if charts else ""


def key(names: Sequence[tuple[str, int]]) -> str:
    """What colours and shapes stand for."""
    items = "".join(
        f"<span><i class='swatch {tone_class(tone)}'></i>{html.escape(name)}</span>" for name, tone in names
    )
    return f"<p class='key'>{items}</p>" if items else ""


def picture(png: bytes, *, alt: str, caption: str) -> str:
    """A picture within the page, with its caption (plain text)."""
    return (
        f"<figure><img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
