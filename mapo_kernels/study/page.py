"""A page as Markdown, and the same as one HTML file with its plots inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping

from mapo_kernels.study.tables import Table

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; display: block; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto;
        font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e3e3e3; padding: 0.25rem 0.6rem; }
th { text-align: left; vertical-align: bottom; }
code { background: #f3f3f3; padding: 0 0.2rem; } summary { cursor: pointer; margin: 0.6rem 0; }
"""


def heading(level: int, text: str) -> str:
    """A heading; 1 is the page's own."""
    return f"{'#' * level} {text}"


def bullets(lines: list[str]) -> str:
    """A list of sentences."""
    return "\n".join(f"- {line}" for line in lines)


def figure(name: str, text: str) -> str:
    """The plot of that name; `text` is for those who do not see it."""
    return f"![{text}]({name}.png)"


def table(content: Table, *, folded: bool = False) -> str:
    """A table under its title; a long one shows when its title is clicked on."""
    if not folded:
        return f"{content.title}:\n\n{content.markdown()}"
    summary = f'<details markdown="1"><summary>{html.escape(content.title)}</summary>'
    return f"{summary}\n\n{content.markdown()}\n\n</details>"


def as_html(markdown: str, title: str, images: Mapping[str, bytes]) -> str:
    """One HTML file.

    Args:
        markdown: of the whole page.
        title: of the window.
        images: PNGs by the file name that the page has; they go inside.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)

    def inside(match: re.Match[str]) -> str:
        data = base64.b64encode(images[match[1]]).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^"]+\.png)"', inside, body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
