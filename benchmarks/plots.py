"""Plots of a result file: ratios around 1, everything else on axes that begin at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .providers import COMPILED, OURS, PLAIN
from .report import Row, by_case, times

# Colours that people with any colour vision tell apart, and markers; ours are black and grey, its
# variants hollow.
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour}
    for name, colour, marker, hollow in (
        (OURS, "#000000", "o", False),
        (f"{OURS} in place", "#000000", "o", True),
        (f"{OURS} whole head", "#777777", "s", True),
        (f"{OURS} log-probs", "#777777", "D", True),
        (COMPILED + OURS, "#777777", "v", True),
        (PLAIN, "#0072B2", "^", False),
        (COMPILED + PLAIN, "#56B4E9", "v", False),
        ("TRL", "#D55E00", "s", False),
        ("Liger", "#009E73", "D", False),
        ("verl", "#CC79A7", "P", False),
        ("cut-cross-entropy", "#E69F00", "X", False),
        ("authors' loop", "#8C6D31", "*", False),
    )
}
LARGEST = 128  # Ratios beyond it are drawn at the edge, with their number.


# What is drawn of a row, by what the axis says.
QUANTITIES: dict[str, Callable[[Row], float]] = {
    (TIME := "ms"): lambda row: row["median_ms"],
    (MEMORY := "peak MB"): lambda row: row["peak_bytes"] / 1e6,
    (TOKENS := "tokens, padding included"): lambda row: row["tokens"],
    (LIVE := "share of tokens alive"): lambda row: row["live"],
    (KEPT := "columns that every token keeps"): lambda row: int(
        row["shape"].rpartition(", ")[2].removesuffix(" kept")
    ),
}


def _figure(width: float, height: float, drawn: set[str]) -> Figure:
    """A figure with a legend of what is drawn, in the order of the styles."""
    figure = Figure(figsize=(width, height), layout="constrained")
    handles = [Line2D([], [], label=x, **STYLES[x]) for x in STYLES if x in drawn]
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def _relative_time(rows: list[Row]) -> Figure | None:
    """A panel a level, a row a shape: each time over ours, and where 90% of its samples lie."""
    levels: dict[str, list[dict[str, Row]]] = {}
    for found in by_case(rows):
        if len(found) > 1:
            levels.setdefault(found[OURS]["level"], []).append(found)
    if not levels:
        return None
    ratios = [times(row, x[OURS]) for cases in levels.values() for x in cases for row in x.values()]
    # As far to the left of 1 as to the right.
    widest = min(2 ** np.ceil(np.abs(np.log2(ratios)).max()), LARGEST)
    n_cases = [len(cases) for cases in levels.values()]
    drawn = {name for cases in levels.values() for found in cases for name in found}
    figure = _figure(9.5, 1.6 + 0.42 * sum(n_cases) + 0.35 * len(levels), drawn)
    axes = figure.subplots(len(levels), sharex=True, squeeze=False, height_ratios=n_cases)[:, 0]
    for axis, (level, cases) in zip(axes, levels.items(), strict=True):
        names = [name for name in STYLES if any(name in found for found in cases)]
        for y, found in enumerate(cases):
            axis.axhspan(y - 0.5, y + 0.5, color="#F2F2F2" if y % 2 else "white", zorder=-1)
            for name, row in found.items():
                ratio = times(row, found[OURS])
                ends = ratio * np.quantile(row["samples_ms"], (0.05, 0.95)) / row["median_ms"]
                height = y + 0.6 * ((names.index(name) + 0.5) / len(names) - 0.5)
                axis.hlines(height, *ends, color=STYLES[name]["color"], linewidth=1.5)
                x = min(max(ratio, 1 / widest), widest)
                axis.plot(x, height, linestyle="", **STYLES[name])
                if x != ratio:
                    axis.text(x / 1.1, height, f"{ratio:.0f}", ha="right", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=1, zorder=0)
        axis.set_title(level, loc="left", fontsize=10)
        axis.set_yticks(range(len(cases)), [found[OURS]["shape"] for found in cases], fontsize=9)
        axis.set(xscale="log", xlim=(0.9 / widest, widest / 0.9), ylim=(len(cases) - 0.5, -0.5))
        ticks = 2.0 ** np.arange(-np.log2(widest), np.log2(widest) + 1)
        axis.set_xticks(ticks, [f"{x:.0f}" if x >= 1 else f"1/{1 / x:.0f}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, axis="x")
    axis.set_xlabel(
        f"time over that of {OURS} (right of 1 it is faster); lines: 90% of the samples"
    )
    return figure


def _lines(rows: list[Row], x: str, y: str) -> Figure | None:
    """A panel a level, a line a provider, of times with bars from the 20th to 80th percentile.

    `x` and `y` are names of `QUANTITIES`. None where `x` has one value: that is no line.
    """
    values = sorted({QUANTITIES[x](row) for row in rows})
    if len(values) < 2:
        return None
    levels = list(dict.fromkeys(row["level"] for row in rows))
    figure = _figure(max(7, 1 + 4 * len(levels)), 4.4, {row["provider"] for row in rows})
    for axis, level in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        for name, style in STYLES.items():
            line = [row for row in rows if (row["level"], row["provider"]) == (level, name)]
            line.sort(key=QUANTITIES[x])
            xs, ys = ([QUANTITIES[quantity](row) for row in line] for quantity in (x, y))
            ends = [[row["p20_ms"] for row in line], [row["p80_ms"] for row in line]]
            axis.errorbar(xs, ys, np.abs(np.subtract(ends, ys)) if y == TIME else None, **style)
        axis.set(title=level, xlabel=x, ylabel=y, ylim=(0, None))
        if x == KEPT:  # At least one, and each number a multiple of the one before.
            axis.set_xscale("log")
            axis.set_xticks(values, [f"{value:.0f}" for value in values])
            axis.minorticks_off()
        else:
            axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.grid(alpha=0.3)
    return figure


def draw(found: dict[str, Any]) -> dict[str, Figure]:
    """The plots of a result file by name, those that have something to show."""
    rows = [row for row in found["rows"] if row["status"] == "ok"]

    def of(*sweeps: str) -> list[Row]:
        return [row for row in rows if row["sweep"] in sweeps]

    heads = [row for row in of("tokens") if row["head"]]
    drawn = {
        "relative_time": _relative_time(of("tokens", "dtype", "heads", "common")),
        "memory_against_tokens": _lines(heads, TOKENS, MEMORY),
        "time_against_live": _lines(of("live"), LIVE, TIME),
        "time_against_kept": _lines(of("kept"), KEPT, TIME),
    }
    where = found["environment"]
    caption = f"{where['device']}, commit {(where['commit'] or 'unknown')[:9]}"
    figures = {kind: figure for kind, figure in drawn.items() if figure is not None}
    for kind, figure in figures.items():
        figure.suptitle(f"{kind.replace('_', ' ')} ({caption})", fontsize=10)
    return figures
