"""The plots of `study ablation`, from its records alone; intervals are 95%, over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mapo_kernels.demo.styles import SETTINGS, STYLES
from mapo_kernels.study.ablation_findings import FORMS, answers
from mapo_kernels.study.ablation_results import BASE, MEASURE_NAMES, MEASURES, Ablation, Setting
from mapo_kernels.study.comparisons import Estimate
from mapo_kernels.study.figures import Figures
from mapo_kernels.study.settings import ESTIMATORS, READ_SUCCESS, REGIMES

# Of the five forms of lambda(p) curves show the paper's: the others have a plot of their own.
SHOWN = tuple(name for name in ESTIMATORS if name not in FORMS)
OVER_TIME = {
    "gradient_norm": ("How large are gradients, before clipping?", "gradient norm"),
    "advantage_abs": ("How large are advantages?", "mean |A|"),
    "lambda_mean": ("What weight has the percent deviation?", "mean lambda(p)"),
    "groups_without_signal": ("How many groups have no signal?", "share of groups sampled"),
}
Row = tuple[str, Estimate | None, bool]  # estimator, estimate, and whether its mark is hollow


def draw(ablation: Ablation) -> Figures:
    """Every plot that there are runs for."""
    settings = [Setting("main", regime, "binary") for regime in REGIMES]
    settings = [x for x in settings if ablation.estimators(x)]
    drawn: Figures = {}
    if settings:
        drawn["ablation_success"] = _curves(
            ablation, settings, "held_out", ("How does success grow?", "held-out success")
        )
        answered = answers(ablation)
        if "estimator" in answered:
            for measure in MEASURES:
                name = f"ablation_against_grpo_{measure}"
                drawn[name] = _against_grpo(ablation, settings, measure)
        if "lambda" in answered:
            drawn["ablation_lambda_forms"] = _forms(ablation, settings)
        for what, text in OVER_TIME.items():
            drawn[f"ablation_{what}"] = _curves(ablation, settings, what, text)
    known, guessed = (Setting("main", "mixed", x) for x in ("partial-success", "partial"))
    if set(ablation.estimators(known)) & set(ablation.estimators(guessed)):
        drawn["ablation_threshold"] = _threshold(ablation, known, guessed)
    return drawn


def _panels(titles: Sequence[str], title: str, high: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their y-axis, under one title."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(max(7.6, 2.4 + 3.4 * len(titles)), high))
        axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for panel, text in zip(axes, titles, strict=True):
            panel.set_title(text, fontsize=10)
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure, list(axes)


def _curves(
    ablation: Ablation, settings: Sequence[Setting], what: str, text: tuple[str, str]
) -> Figure:
    """A line an estimator with its interval as a band; a panel a regime."""
    title, label = text
    figure, axes = _panels([x.regime for x in settings], title)
    lines = {}
    for panel, setting in zip(axes, settings, strict=True):
        for name in ablation.estimators(setting):
            steps, values = ablation.curve(setting, name, what)
            if name not in SHOWN or not steps:
                continue
            style = STYLES[name]
            (lines[style.label],) = panel.plot(
                steps, [x.value for x in values], color=style.colour, linewidth=1.6
            )
            banded = [(s, x) for s, x in zip(steps, values, strict=True) if x.low is not None]
            low, high = ([getattr(x, end) for _, x in banded] for end in ("low", "high"))
            panel.fill_between(
                [s for s, _ in banded], low, high, color=style.colour, alpha=0.13, linewidth=0
            )
        panel.set_xlabel("RL step")
    axes[0].set(ylabel=label)
    axes[0].set_ylim(0, None)
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", frameon=False)
    return figure


def _forest(panel: Axes, names: Sequence[str], rows: Iterable[Row]) -> None:
    """A mark with its interval on the line of its estimator; hollow ones a little below."""
    for name, found, hollow in rows:
        if found is None:
            continue
        y = len(names) - 1 - list(names).index(name) - (0.18 if hollow else -0.12)
        style = STYLES[name]
        if found.low is not None and found.high is not None:
            panel.plot([found.low, found.high], [y, y], color=style.colour, linewidth=2)
        panel.plot(
            *([found.value], [y]),
            marker=style.marker,
            markersize=7,
            color=style.colour,
            markerfacecolor="white" if hollow else style.colour,
        )
    panel.axvline(0, color="#444444", linewidth=1)
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.set_yticks(range(len(names)), [STYLES[x].label for x in reversed(names)])
    panel.set_ylim(-0.6, len(names) - 0.4)


def _legend(figure: Figure, filled: str, hollow: str) -> None:
    marks = [
        Line2D([], [], color="#444444", marker="o", markerfacecolor=x, label=y)
        for x, y in (("#444444", filled), ("white", hollow))
    ]
    figure.legend(handles=marks, loc="outside right upper", frameon=False)


def _against_grpo(ablation: Ablation, settings: Sequence[Setting], measure: str) -> Figure:
    """At own learning rates (filled), and at equal gradient norms (hollow)."""
    title = f"Is the {MEASURE_NAMES[measure]} different from GRPO's, on the same seeds?"
    figure, axes = _panels([x.regime for x in settings], title, high=4.8)
    names = [name for name in ESTIMATORS if name != BASE]
    for panel, setting in zip(axes, settings, strict=True):
        equal = setting._replace(stage="norm")
        rows = [
            (name, ablation.against(where, name, BASE, measure), where is equal)
            for where in (setting, equal)
            for name in names
        ]
        _forest(panel, names, rows)
        panel.set_xlabel("difference from GRPO")
    _legend(figure, "own learning rate", "equal gradient norm")
    return figure


def _forms(ablation: Ablation, settings: Sequence[Setting]) -> Figure:
    title = "Does the form of lambda(p) matter?"
    figure, axes = _panels([x.regime for x in settings], title, high=3.2)
    for panel, setting in zip(axes, settings, strict=True):
        rows = [
            (name, ablation.against(setting, name, "mapo", measure), measure == "area")
            for measure in MEASURES
            for name in FORMS
        ]
        _forest(panel, FORMS, rows)
        panel.set_xlabel("difference from the quadratic")
    _legend(figure, MEASURE_NAMES["final"], MEASURE_NAMES["area"])
    return figure


def _threshold(ablation: Ablation, known: Setting, guessed: Setting) -> Figure:
    title = "Does MAPO gain from success= with continuous rewards?"
    figure, axes = _panels(["mixed, partial rewards"], title, high=3.2)
    rows = [
        (name, ablation.between((known, name), (guessed, name), measure), measure == "area")
        for measure in MEASURES
        for name in READ_SUCCESS
    ]
    _forest(axes[0], READ_SUCCESS, rows)
    axes[0].set_xlabel("success known apart - default threshold")
    _legend(figure, MEASURE_NAMES["final"], MEASURE_NAMES["area"])
    return figure
