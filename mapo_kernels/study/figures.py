"""The study's plots, from result files alone: one question a plot, a colour for each estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mapo_kernels.demo.styles import SETTINGS, STYLES
from mapo_kernels.files import write_figure
from mapo_kernels.study.analytic import FAILED, HIGH, LOW, VARIANTS
from mapo_kernels.study.findings import paper_advantages

Found = dict[str, Any]
Figures = dict[str, Figure]  # by file name, without its ending

GREY = "#444444"
MAPO = [name for name, variant in VARIANTS.items() if variant.estimator == "mapo"]


def write_all(figures: Mapping[str, Figure], out: Path) -> list[Path]:
    """Write PNGs into a folder; returns their paths."""
    paths = [out / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_figure(figure, path, dpi=100)
    return paths


def new_figure(title: str, x: str, y: str, *, wide: float = 7.2) -> tuple[Figure, Axes]:
    """A figure of one panel, whose legend will stand beside it."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(wide, 4.2))
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def legend_beside(axes: Axes, **options: Any) -> None:
    """The legend to the right of the panel, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, **options)


def of_synthetic(found: Found) -> Figures:
    """The plots of `study synthetic`."""
    size = max(found["settings"]["group_sizes"])
    rows = [row for row in found["rows"] if row["std_correction"] == 1]
    binary = [x for x in rows if x["kind"] == "binary" and x["group_size"] == size]
    drawn = {
        "synthetic_certainty": _over_p(
            [x for x in binary if x["quantity"] == "lambda"],
            [*MAPO, "grpo", "apd"],
            ("What weight has the percent deviation?", "lambda(p)"),
            size,
        ),
        "synthetic_success": _over_p(
            [x for x in binary if x["quantity"] == "success"],
            VARIANTS,
            ("What advantage does a success get?", "advantage of a success"),
            size,
        ),
        "synthetic_failure": _over_p(
            [x for x in binary if x["quantity"] == "failure"],
            VARIANTS,
            ("What advantage does a failure get?", "advantage of a failure"),
            size,
        ),
        "synthetic_gradient": _over_p(
            [x for x in rows if x["kind"] == "gradient" and x["group_size"] == size],
            MAPO,
            ("How large is the gradient, compared with GRPO's?", "norm over GRPO's, rho(p)"),
            size,
        ),
        "synthetic_reversion": _reversion(found),
        "synthetic_mirror": _mirror(found),
    }
    drawn["synthetic_gradient"].axes[0].axhline(1, color=STYLES["grpo"].colour, linewidth=1)
    return drawn


def _over_p(rows: list[Found], variants: Iterable[str], text: tuple[str, str], size: int) -> Figure:
    """Measured values as marks on the lines of the closed forms, over p."""
    title, label = text
    figure, axes = new_figure(title, f"success ratio p of a group of {size}", label)
    for variant in variants:
        points = sorted(
            (x["successes"] / size, x["expected"], x["measured"])
            for x in rows
            if x["variant"] == variant
        )
        p, expected, measured = zip(*points, strict=True)
        style = STYLES[variant]
        axes.plot(p, expected, color=style.colour, linewidth=1.6)
        axes.plot(*(p, measured, style.marker), color=style.colour, label=style.label, markersize=5)
    axes.set(xlim=(-0.03, 1.03))
    legend_beside(axes, title="marks: computed\nlines: closed form")
    return figure


def _reversion(found: Found) -> Figure:
    title = "Is a partial answer punished harder than a failure?"
    figure, axes = new_figure(title, "", "|A| of the lowest reward (c = 0)", wide=8.4)
    groups = {HIGH: "0.9 in [0.9, 1, 1, 1]"}
    groups[LOW] = "0.1 in [0.1, 0.1, 1, 1]"
    _bars(axes, groups, lambda group, x: abs(paper_advantages(found, group, x)[0]))
    return figure


def _mirror(found: Found) -> Figure:
    title = "Do an easy and a failed group get the same advantages?"
    figure, axes = new_figure(title, "", "A of the lowest reward (c = 0)", wide=8.4)
    groups = {HIGH: "0.9 in [0.9, 1, 1, 1]"}
    groups[FAILED] = "0 in [0, 0.1, 0.1, 0.1]"
    _bars(axes, groups, lambda group, x: paper_advantages(found, group, x)[0])
    return figure


def _bars(axes: Axes, groups: Mapping[str, str], height: Callable[[str, str], float]) -> None:
    """Two bars for each estimator: a filled one and an outlined one."""
    names = list(VARIANTS)
    colours = [STYLES[name].colour for name in names]
    shown = []
    for i, (group, label) in enumerate(groups.items()):
        where = [x + 0.4 * i - 0.2 for x in range(len(names))]
        heights = [height(group, name) for name in names]
        fill = ["white"] * len(names) if i else colours
        axes.bar(where, heights, 0.36, color=fill, edgecolor=colours, linewidth=1.8)
        shown.append(Patch(facecolor="white" if i else GREY, edgecolor=GREY, label=label))
    axes.axhline(0, color=GREY, linewidth=0.8)
    labels = [STYLES[name].label for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=30, horizontalalignment="right")
    axes.grid(visible=False, axis="x")
    axes.legend(handles=shown, frameon=False)
