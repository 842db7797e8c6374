"""Plots of a result file: time, memory, share of the roof, speed-up, and dead tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mapo_kernels.files import write_figure

from .levels import COMPILED, OURS, PLAIN
from .report import Row, ours_of, times

# Colours that people with any colour vision tell apart; ours is the dark one.
STYLE = {
    OURS: ("#000000", "o"),
    "mapo_kernels in place": ("#555555", "s"),
    "torch.compile of mapo_kernels": ("#999999", "D"),
    PLAIN: ("#0072B2", "^"),
    COMPILED: ("#56B4E9", "v"),
    "TRL": ("#D55E00", "P"),
    "Liger": ("#009E73", "X"),
    "verl": ("#CC79A7", "*"),
    "cut-cross-entropy": ("#E69F00", "d"),
    "authors' loop": ("#F0E442", "p"),
}
TOKENS = "tokens (rewards, for advantages)"
LIVE = "share of tokens alive"


def _lines(rows: list[Row], x: str, y: Callable[[Row], float | None], label: str) -> Figure | None:
    """A panel a level, a line a provider; None where there is nothing to draw."""
    rows = [row for row in rows if y(row) is not None]
    levels = list(dict.fromkeys(row["level"] for row in rows))
    if not levels:
        return None
    columns = min(3, len(levels))
    lines = math.ceil(len(levels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    drawn = {}
    for i, level in enumerate(levels):
        axis = figure.add_subplot(lines, columns, i + 1)
        for provider, (color, marker) in STYLE.items():
            of_it = [row for row in rows if (row["level"], row["provider"]) == (level, provider)]
            points = sorted((row[x], y(row)) for row in of_it)
            if points:
                (drawn[provider],) = axis.plot(
                    *zip(*points, strict=True), color=color, marker=marker
                )
        axis.set(title=level, xlabel=TOKENS if x == "tokens" else LIVE, ylabel=label)
        if x == "tokens":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        else:
            axis.set(xlim=(-0.03, 1.03), ylim=(0, None))
        axis.grid(alpha=0.3, which="both")
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4)
    return figure


def _speed_up(rows: list[Row]) -> Figure | None:
    """Bars: how many times longer than ours each provider takes, at each level's largest case."""
    largest: dict[str, int] = {}
    for row in rows:
        largest[row["level"]] = max(row["tokens"], largest.get(row["level"], 0))
    bars = []
    for row in rows:
        ours = ours_of(row, rows)
        if ours and row["provider"] != OURS and row["tokens"] == largest[row["level"]]:
            name = f"{row['level']}, {row['shape']}: {row['provider']}"
            bars.append((name, times(row, ours), STYLE[row["provider"]][0]))
    if not bars:
        return None
    figure = Figure(figsize=(10, 0.9 + 0.3 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    names, values, colors = zip(*reversed(bars), strict=True)
    axis.bar_label(axis.barh(names, values, color=colors), fmt="%.2f", padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time over the time of mapo_kernels (right of 1: ours is faster)")
    axis.margins(x=0.15, y=0.01)
    axis.grid(alpha=0.3, axis="x", which="both")
    return figure


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write the plots of a result file as PNG; returns their paths."""
    # Of whole steps that were measured.
    ways = ("both", "score")
    rows = [x for x in found["rows"] if x["status"] == "ok" and x["direction"] in ways]
    live = [row for row in rows if row["sweep"] == "live"]
    rows = [row for row in rows if row["sweep"] == "tokens"]

    def time(row: Row) -> float:
        return row["median_ms"]

    def memory(row: Row) -> float | None:
        return row["peak_bytes"] / 1e6 if row["peak_bytes"] else None

    def share(row: Row) -> float:
        return row["percent_of_roof"]

    figures = {
        "time_against_tokens": _lines(rows, "tokens", time, "ms"),
        "memory_against_tokens": _lines(rows, "tokens", memory, "peak MB"),
        "percent_of_roof": _lines(rows, "tokens", share, "% of the roof"),
        "speed_up": _speed_up(rows),
        "time_against_live": _lines(live, "live", time, "ms"),
    }
    where = found["environment"]
    caption = f"{where['device']}, commit {(where['commit'] or 'unknown')[:9]}"
    paths = []
    for kind, figure in figures.items():
        if figure is not None:
            figure.suptitle(f"{kind.replace('_', ' ')} ({caption})", fontsize=10)
            paths.append(folder / f"{name}_{kind}.png")
            write_figure(figure, paths[-1], dpi=100)
    return paths
