"""The console's face of a run: a progress bar, and tables of what was found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .case import OURS

BAD = {"wrong": "bold red", "failed": "red"}


def terminal() -> Console:
    """The console; wide where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 150)


def ours_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Our row of the same case and direction, if it was measured."""
    same = ("level", "shape", "direction", "live", "group_size", "padding", "no_signal")
    for other in rows:
        if other["provider"] == OURS and all(other[k] == row[k] for k in same):
            return other if other["status"] == "ok" else None
    return None


def left_out(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each provider of a level that was not measured, and why."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] == "unavailable":
            key = row["level"], row["provider"], row["reason"]
            reasons[key] = reasons.get(key, 0) + 1
    return [f"{level}: {provider}: {reason}" for level, provider, reason in reasons]


def rate(row: dict[str, Any]) -> str:
    """The achieved rate in the unit of the roof that binds."""
    if row["roof"] == "products":
        return f"{row['teraflops_per_second']:.3g} TFLOP/s"
    return f"{row['gigabytes_per_second']:.3g} GB/s"


def size(nbytes: int | None) -> str:
    """Bytes in MB, for people."""
    if nbytes is None:
        return ""
    return f"{nbytes / 1e6:.0f}" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g}"


# Heading, how a measured row shows it, and whether a narrow terminal leaves it out.
COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str], bool], ...] = (
    ("ms", lambda row: f"{row['median_ms']:.4g}", False),
    ("20% - 80%", lambda row: f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}", True),
    ("rate", rate, True),
    ("of the roof", lambda row: f"{row['percent_of_roof']:.1f}% {row['roof']}", False),
    ("peak MB", lambda row: size(row.get("peak_bytes")), True),
    ("error", lambda row: f"{row['error']:.0e}", True),
)


def _times_ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    ours = ours_of(row, rows)
    if ours is None or ours is row:
        return ""
    return f"{row['median_ms'] / ours['median_ms']:.2f}"


def case_table(rows: list[dict[str, Any]], every: list[dict[str, Any]], width: int) -> Table:
    """The measured rows of one case: a line for each provider and direction."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = [(name, cell) for name, cell, wide in COLUMNS if width >= 120 or not wide]
    table.add_column("", no_wrap=True, min_width=30)
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("times ours", justify="right", no_wrap=True)
    for row in rows:
        names = [row["provider"], row["direction"]]
        if row["status"] == "ok":
            table.add_row(*names, *(cell(row) for _, cell in columns), _times_ours(row, every))
    return table


def _complaint(row: dict[str, Any]) -> str:
    error = "" if row.get("error") is None else f" (relative error {row['error']:.1e})"
    style = BAD[row["status"]]
    name = escape(f"{row['provider']}, {row['direction']}")
    return f"  {name}: [{style}]{row['status']}[/]: {escape(row['reason'])}{error}"


def show_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """A heading a level, a table a case; what is wrong is said in words."""
    level = None
    cases: dict[tuple[str, str, float, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] != "unavailable":
            key = row["level"], row["shape"], row["live"], row["group_size"]
            cases.setdefault(key, []).append(row)
    for (name, shape, live, _), found in cases.items():
        if name != level:
            console.print(f"\n[bold]{escape(name)}[/]")
            level = name
        console.print(f"[cyan]{escape(shape)}[/], {live:.0%} live", highlight=False)
        console.print(case_table(found, rows, console.width))
        for row in found:
            if row["status"] in BAD:
                console.print(_complaint(row))


def show(results: dict[str, Any], console: Console) -> None:
    """Print a run: where, the roofs, a table a level, what was left out."""
    where, roofs = results["environment"], results["roofs"]
    about = f"{where['device']}, {where['threads']} threads, backend {where['backend']}"
    console.print(about, markup=False)
    products = roofs["products_teraflops_per_second"].items()
    parts = [
        f"copy {roofs['copy_gigabytes_per_second']:.4g} GB/s",
        f"launch {roofs['launch_microseconds']:.3g} us",
        *[f"products {name} {rate:.3g} TFLOP/s" for name, rate in products],
    ]
    console.print("roofs of this run: " + ", ".join(parts), markup=False)
    if results["dry_run"]:
        console.print("dry run: tiny shapes, interpreted kernels; the times mean nothing")
    parity = results["parity"]
    if parity:
        verdict = "passed" if parity["passed"] else "[bold red]FAILED[/]"
        console.print(f"parity tests on the device: {verdict}, {escape(parity['summary'])}")
    show_rows(results["rows"], console)
    if any(row["direction"] == "backward" for row in results["rows"]):
        console.print(
            "Where forward computes the gradient too, backward has little left to do (and can pass "
            "its roof): only whole steps compare."
        )
    for line in left_out(results["rows"]):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(f"{results['seconds']:.0f} seconds")


class Bar:
    """A progress bar whose steps are a provider on a case."""

    def __init__(self, console: Console) -> None:
        """Made before the number of steps is known."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> Bar:
        """Start drawing."""
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop and leave no trace."""
        self.progress.stop()

    def announce(self, total: int) -> None:
        """How many steps there are."""
        self.progress.update(self.task, total=total)

    def show(self, case: Any, provider: str, rows: list[dict[str, Any]]) -> None:
        """One step is done; what is wrong stays on the screen."""
        self.progress.update(self.task, advance=1, description=f"{case.level}: {provider}")
        for row in rows:
            if row["status"] in BAD:
                text = f"{row['level']}, {row['shape']}, {row['direction']}: {provider} is "
                text += f"{row['status']}: {row['reason']}"
                self.progress.console.print(text, markup=False)
