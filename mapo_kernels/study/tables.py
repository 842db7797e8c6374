"""Tables of results, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table as RichTable

NUMBER = re.compile(r"(\*\*)?[-+]?(\d+(\.\d+)?(e[-+]\d+)?( [(\[/].*)?)?(\*\*)?$")


class Table(NamedTuple):
    """A title, and cells as texts."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """For the terminal: names to the left, numbers to the right."""
        drawn = RichTable(title=self.title, title_justify="left")
        for head, right in zip(self.heads, self._numeric(), strict=True):
            drawn.add_column(head, justify="right" if right else "left")
        for line in self.lines:
            drawn.add_row(*line)
        return drawn

    def markdown(self) -> str:
        """The cells alone: what they are is said around them."""
        rule = ["---:" if right else "---" for right in self._numeric()]
        rows = [[x.replace("|", "\\|") for x in cells] for cells in (self.heads, *self.lines)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))

    def _numeric(self) -> list[bool]:
        """Which columns hold numbers, or dashes, alone."""
        columns = zip(*self.lines, strict=True) if self.lines else [()] * len(self.heads)
        return [all(NUMBER.match(cell) for cell in column) for column in columns]


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
