"""Plots of a result file: time, memory, share of the roof, speed-up, and dead tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from mapo_kernels.files import write_figure  # noqa: E402

from .case import COMPILED, OURS, PLAIN  # noqa: E402
from .console import ours_of  # noqa: E402

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
Row = dict[str, Any]


def _measured(rows: Iterable[Row], sweep: str) -> list[Row]:
    """Rows of a sweep with a time, of the whole step."""
    return [
        row
        for row in rows
        if row["status"] == "ok" and row["sweep"] == sweep and row["direction"] in ("both", "score")
    ]


def _by_level(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["level"]][row["provider"]].append(row)
    return found


def _lines(
    rows: list[Row], x: str, y: Callable[[Row], float | None], labels: tuple[str, str], log: str
) -> Any:
    """A panel a level, a line a provider; None where there is nothing to draw."""
    levels = _by_level(row for row in rows if y(row) is not None)
    if not levels:
        return None
    columns = min(3, len(levels))
    lines = -(-len(levels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    seen = {}
    for axis, (level, providers) in zip(axes.flat, levels.items(), strict=False):
        for provider, found in providers.items():
            points = sorted((row[x], y(row)) for row in found)
            color, marker = STYLE[provider]
            (seen[provider],) = axis.plot(
                *zip(*points, strict=True), color=color, marker=marker, label=provider
            )
        axis.set(title=level, xlabel=labels[0], ylabel=labels[1])
        axis.set_xscale("log", base=2) if "x" in log else axis.set_xlim(-0.03, 1.03)
        axis.set_yscale("log") if "y" in log else axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(levels) :]:
        axis.set_visible(False)
    names = [name for name in STYLE if name in seen]
    figure.legend(
        [seen[name] for name in names], names, loc="outside lower center", ncols=min(4, len(names))
    )
    return figure


def _speed_up(rows: list[Row]) -> Any:
    """Bars: how many times longer than ours each provider takes, at each level's largest case."""
    bars = []
    for level, providers in _by_level(rows).items():
        largest = max(row["tokens"] for row in providers.get(OURS, [])) if OURS in providers else 0
        for provider, found in providers.items():
            for row in found:
                ours = ours_of(row, rows)
                if row["tokens"] == largest and provider != OURS and ours is not None:
                    name = f"{level}, {row['shape']}: {provider}"
                    bars.append((name, row["median_ms"] / ours["median_ms"], provider))
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(10, 0.9 + 0.3 * len(bars)), layout="constrained")
    names, values, providers_ = zip(*reversed(bars), strict=True)
    drawn = axis.barh(names, values, color=[STYLE[x][0] for x in providers_])
    axis.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time over the time of mapo_kernels (right of 1: ours is faster)")
    axis.margins(x=0.15, y=0.01)
    axis.grid(alpha=0.3, axis="x", which="both")
    return figure


def draw(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write the plots of a result file as PNG; returns their paths."""
    rows = _measured(results["rows"], "tokens")
    live = _measured(results["rows"], "live")
    tokens = "tokens (rewards, for advantages)"

    def megabytes(row: Row) -> float | None:
        return row["peak_bytes"] / 1e6 if row.get("peak_bytes") else None

    def time(row: Row) -> float:
        return row["median_ms"]

    def percent(row: Row) -> float:
        return row["percent_of_roof"]

    figures = {
        "time_against_tokens": _lines(rows, "tokens", time, (tokens, "ms"), "xy"),
        "memory_against_tokens": _lines(rows, "tokens", megabytes, (tokens, "peak MB"), "xy"),
        "percent_of_roof": _lines(rows, "tokens", percent, (tokens, "% of the roof"), "xy"),
        "speed_up": _speed_up(rows),
        "time_against_live": _lines(live, "live", time, ("share of tokens alive", "ms"), ""),
    }
    where = results["environment"]
    caption = f"{where['device']}, commit {(where['commit'] or 'unknown')[:9]}"
    paths = []
    for kind, figure in figures.items():
        if figure is not None:
            figure.suptitle(f"{kind.replace('_', ' ')} ({caption})", fontsize=10)
            paths.append(folder / f"{name}_{kind}.png")
            write_figure(figure, paths[-1], dpi=100)
            plt.close(figure)
    return paths
