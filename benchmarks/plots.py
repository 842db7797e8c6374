"""Plots of a result file: time over ours at the largest shapes, and against dead tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mapo_kernels.files import write_figure

from .providers import COMPILED, OURS, PLAIN
from .report import WHOLE_STEPS, Row, by_case, times

# Colours that people with any colour vision tell apart; ours is the dark one.
COLOURS = {
    OURS: "#000000",
    "mapo_kernels in place": "#555555",
    "mapo_kernels whole head": "#999999",
    "mapo_kernels log-probs": "#777777",
    COMPILED + OURS: "#999999",
    PLAIN: "#0072B2",
    COMPILED + PLAIN: "#56B4E9",
    "TRL": "#D55E00",
    "Liger": "#009E73",
    "verl": "#CC79A7",
    "cut-cross-entropy": "#E69F00",
    "authors' loop": "#F0E442",
}


def _time_against_live(rows: list[Row]) -> Figure | None:
    """A panel a level, a line a provider; None where there is nothing to draw."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    if not levels:
        return None
    columns = min(3, len(levels))
    lines = math.ceil(len(levels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    drawn = {}
    for i, level in enumerate(levels):
        axis = figure.add_subplot(lines, columns, i + 1)
        for provider, colour in COLOURS.items():
            of_it = [row for row in rows if (row["level"], row["provider"]) == (level, provider)]
            points = sorted((row["live"], row["median_ms"]) for row in of_it)
            if points:
                (drawn[provider],) = axis.plot(*zip(*points, strict=True), color=colour, marker="o")
        axis.set(title=level, xlabel="share of tokens alive", ylabel="ms")
        axis.set(xlim=(-0.03, 1.03), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4)
    return figure


def _time_against_kept(rows: list[Row]) -> Figure | None:
    """A line a provider, over the columns that every token keeps; None where there are none."""
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for provider, colour in COLOURS.items():
        of_it = [row for row in rows if row["provider"] == provider]
        points = sorted((kept_of(row), row["median_ms"]) for row in of_it)
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", label=provider)
    axis.set(xscale="log", yscale="log", xlabel="columns that every token keeps", ylabel="ms")
    axis.set_title(f"loss and gradients of {rows[0]['tokens']} tokens, {rows[0]['head']} head")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    return figure


def kept_of(row: Row) -> int:
    """The number of kept columns in the name of a row's shape."""
    return int(row["shape"].rpartition(", ")[2].partition(" ")[0])


def _speed_up(rows: list[Row]) -> Figure | None:
    """Bars: how many times longer than ours each provider takes, at each level's largest case."""
    largest: dict[str, int] = {}
    for row in rows:
        largest[row["level"]] = max(row["tokens"], largest.get(row["level"], 0))
    bars = [
        (f"{row['level']}, {row['shape']}: {name}", times(row, found[OURS]), COLOURS[name])
        for found in by_case(rows)
        for name, row in found.items()
        if name != OURS and row["tokens"] == largest[row["level"]]
    ]
    if not bars:
        return None
    figure = Figure(figsize=(10, 0.9 + 0.3 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    names, values, colours = zip(*reversed(bars), strict=True)
    axis.bar_label(axis.barh(names, values, color=colours), fmt="%.2f", padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time over the time of mapo_kernels (right of 1: ours is faster)")
    axis.margins(x=0.15, y=0.01)
    axis.grid(alpha=0.3, axis="x", which="both")
    return figure


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write the plots of a result file as PNG; returns their paths."""
    rows = [x for x in found["rows"] if x["status"] == "ok" and x["direction"] in WHOLE_STEPS]
    figures = {
        "speed_up": _speed_up([row for row in rows if row["sweep"] == "tokens"]),
        "time_against_live": _time_against_live([row for row in rows if row["sweep"] == "live"]),
        "time_against_kept": _time_against_kept([row for row in rows if row["sweep"] == "kept"]),
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
