"""The plots of `study extreme`, from its result file alone."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mapo_kernels.demo.styles import STYLES
from mapo_kernels.study.analytic import VARIANTS
from mapo_kernels.study.figures import Figures, legend_beside, new_figure

Found = dict[str, Any]

GREYS = ("#9e9e9e", "#5f5f5f", "#000000")  # small to large groups, of which none is an estimator's
TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def draw(found: Found) -> Figures:
    """The plots of `study extreme`."""
    groups = found["settings"]["groups"]
    steps = f"How many steps of {groups} groups have any gradient?"
    return {
        "extreme_groups": _shares(found, "groups", "How many groups have a gradient?"),
        "extreme_steps": _shares(found, "steps", steps),
        "extreme_lambda": _weights(found),
        "extreme_first_advantage": _first(
            found,
            ("What advantage does the first success get?", "A of the one success"),
            lambda row: row["success"][0],
        ),
        "extreme_first_gradient": _first(
            found,
            ("How large is the gradient of a first success?", "norm of the gradient"),
            lambda row: row["gradient_norm"],
        ),
        "extreme_first_step": _steps(found),
    }


def _sizes(found: Found) -> list[int]:
    return sorted({row["group_size"] for row in found["signal"]})


def _probability_axis(axes: Axes) -> None:
    """Success probabilities, as far apart near 0 as near 1."""
    axes.set_xscale("logit", one_half="0.5")
    axes.set_xticks(TICKS, [f"{x:g}" for x in TICKS])
    axes.minorticks_off()


def _shares(found: Found, of: str, title: str) -> Figure:
    figure, axes = new_figure(title, "probability p of a success", f"share of {of}")
    for size, colour in zip(_sizes(found), GREYS * 9, strict=False):
        rows = [row for row in found["signal"] if row["group_size"] == size]
        p = [row["p"] for row in rows]
        shares = [row[of] for row in rows]
        y = [x["simulated"] for x in shares]
        low, high = zip(*(x["interval"] for x in shares), strict=True)
        below = [max(a - b, 0) for a, b in zip(y, low, strict=True)]
        above = [max(b - a, 0) for a, b in zip(y, high, strict=True)]
        axes.plot(p, [x["expected"] for x in shares], color=colour, linewidth=1.3)
        bars: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 3, "elinewidth": 1.2}
        axes.errorbar(p, y, (below, above), color=colour, label=f"G = {size}", **bars)
    axes.set_ylim(0, 1.03)
    _probability_axis(axes)
    legend_beside(axes, title="marks: simulated, 95%\nlines: analytic")
    return figure


def _weights(found: Found) -> Figure:
    """Of the smallest groups, for each lambda(p)."""
    size = _sizes(found)[0]
    title = "Which function is MAPO? Mean lambda of groups with signal"
    figure, axes = new_figure(title, f"probability p of a success, G = {size}", "mean lambda")
    rows = [row for row in found["signal"] if row["group_size"] == size]
    for variant in rows[0]["lambda"]:
        style, p = STYLES[variant], [row["p"] for row in rows]
        simulated, expected = zip(*(row["lambda"][variant] for row in rows), strict=True)
        axes.plot(p, expected, color=style.colour, linewidth=1.3)
        axes.plot(p, simulated, style.marker, color=style.colour, label=style.label, markersize=5)
    axes.set_ylim(-0.03, 1.03)
    axes.annotate("1: the percent deviation alone", (0.5, 0.96), ha="center", fontsize=8)
    axes.annotate("0: the z-score alone", (0.015, 0.0), ha="center", va="bottom", fontsize=8)
    _probability_axis(axes)
    legend_beside(axes, title="marks: simulated\nlines: analytic")
    return figure


def _first(found: Found, text: tuple[str, str], value: Any) -> Figure:
    """A line an estimator over the group sizes, which stand at equal distances."""
    title, label = text
    figure, axes = new_figure(title, "answers per prompt, one of them right", label)
    sizes = _sizes(found)
    for variant in VARIANTS:
        rows = {row["group_size"]: row for row in found["first"] if row["variant"] == variant}
        style = STYLES[variant]
        y = [value(rows[size]) for size in sizes]
        axes.plot(range(len(sizes)), y, marker=style.marker, color=style.colour, label=style.label)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_ylim(0, None)
    legend_beside(axes)
    return figure


def _steps(found: Found) -> Figure:
    """The probability of the right answer after one step of each optimizer, over that before."""
    size = _sizes(found)[0]
    title = "What does one step make of the first success?"
    figure, axes = new_figure(title, "", f"its probability, after / before (G = {size})", wide=8.4)
    rows = {row["variant"]: row for row in found["first"] if row["group_size"] == size}
    names = list(rows)
    colours = [STYLES[name].colour for name in names]
    for i, (optimizer, label) in enumerate((("sgd", "SGD"), ("adam", "Adam, first step"))):
        where = [x + 0.4 * i - 0.2 for x in range(len(names))]
        heights = [rows[x][optimizer]["p_after"] / rows[x]["p_before"] for x in names]
        fill = ["white"] * len(names) if i else colours
        axes.bar(where, heights, 0.36, color=fill, edgecolor=colours, linewidth=1.8)
        axes.bar([0], [0], color="white" if i else "#444444", edgecolor="#444444", label=label)
    axes.axhline(1, color="#444444", linewidth=0.8)
    labels = [STYLES[name].label for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=30, horizontalalignment="right")
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False)
    return figure
