"""Tables of results, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table as RichTable


class Table(NamedTuple):
    """A title, and cells as texts."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """For the terminal: names to the left, numbers to the right."""
        drawn = RichTable(title=self.title, title_justify="left")
        for i, head in enumerate(self.heads):
            drawn.add_column(head, justify="right" if i else "left")
        for line in self.lines:
            drawn.add_row(*line)
        return drawn

    def markdown(self) -> str:
        """The cells alone: what they are is said around them."""
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.heads, rule, *self.lines))


def number(value: float | None, digits: int = 3) -> str:
    """With so many decimals, and no -0.000; a dash where there is none."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def beside(measured: float | None, expected: float | None, digits: int = 3) -> str:
    """A number, and what it must be in brackets."""
    if measured is None or expected is None:
        return "-"
    return f"{number(measured, digits)} ({number(expected, digits)})"
