"""The pictures on one page that needs nothing but itself."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Picture", "render"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture and what it says."""

    name: str
    """File name without extension, and its anchor on the page."""
    title: str
    caption: str
    """What is seen, and what to look for."""
    png: bytes


def render(title: str, facts: Mapping[str, str], pictures: Sequence[Picture]) -> str:
    """The page: one HTML file without scripts or links to others."""
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(text)}</td></tr>" for key, text in facts.items())
    places = " &middot; ".join(f"<a href='#{each.name}'>{html.escape(each.title)}</a>" for each in pictures)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><nav>{places}</nav><table>{rows}</table>"
        f"{''.join(map(_section, pictures))}</main></body></html>\n"
    )


def _section(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<section id='{picture.name}'><h2>{html.escape(picture.title)}</h2><p>{html.escape(picture.caption)}</p>"
        f"<div class='scroll'><img alt='{html.escape(picture.title)}' src='data:image/png;base64,{data}'></div>"
        "</section>"
    )


_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --soft: #667085; --line: #e4e7ec; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 4px; }
nav { margin-bottom: 16px; } a { color: #2563eb; text-decoration: none; } a:hover { text-decoration: underline; }
table { border-collapse: collapse; font-size: 13px; }
td { padding: 3px 18px 3px 0; vertical-align: top; } td:first-child { color: var(--soft); white-space: nowrap; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px; margin-top: 22px; }
section p { margin: 0 0 14px; color: var(--soft); max-width: 75ch; }
.scroll { overflow-x: auto; } img { display: block; }
"""
