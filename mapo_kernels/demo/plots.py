"""The figures of the demo, drawn from the log alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from mapo_kernels import group_advantages
from mapo_kernels.demo.settings import REPLAY, WARM_UP, Record
from mapo_kernels.demo.styles import SETTINGS, STYLES
from mapo_kernels.files import write_figure

SMOOTHING = 7  # steps on either side, in the running mean over noisy counts

Grouped = dict[str, list[Record]]  # the runs of each estimator
Curve = list[tuple[int, float]]  # (step, value)


class _Panel(NamedTuple):
    curve: Callable[[Record], Curve]
    title: str
    label: str  # of the y-axis
    limits: tuple[float, float] | None = None


def draw_all(log: Record, out: Path) -> list[Path]:
    """Draw every figure as PNG, if there is a step of RL to draw; returns the files written."""
    configuration = log["configuration"]
    grouped: Grouped = {}
    for run in log["runs"].values():
        if run["phase"] != WARM_UP and run["steps"]:
            grouped.setdefault(run["phase"], []).append(run)
    if not grouped:
        return []
    groups, top_p = configuration["prompts"], configuration["top_p"]
    title = f"Held-out success: {configuration['task']}"
    label = f"exactly right answers (temperature 1, top-p {top_p:g})"
    success = _Panel(_success, title, label, (0, 1))
    title = "Groups without signal: all rewards equal, advantage 0"
    label = f"groups, of {groups} in a step"
    silent = _Panel(_smoothed("groups_without_signal"), title, label, (0, groups))
    title = "Mean importance ratio before any update"
    label = "new over old probability of a sampled token"
    ratio = _Panel(_smoothed("on_policy_ratio"), title, label)
    kept = _Panel(_smoothed("kept_columns"), "Columns kept by top-p", "mean over sampled tokens")
    panels = {"success": [success], "groups_without_signal": [silent]}
    if top_p < 1:
        panels["sampling_masks"] = [ratio, success, kept]
    with matplotlib.rc_context(SETTINGS):
        figures = {name: _curves(grouped, configuration, x) for name, x in panels.items()}
        estimators = dict.fromkeys(phase.removesuffix(REPLAY) for phase in grouped)
        figures["advantages"] = _advantages(list(estimators), configuration)
        for name, figure in figures.items():
            write_figure(figure, out / f"{name}.png", dpi=120)
    return [out / f"{name}.png" for name in figures]


def _success(run: Record) -> Curve:
    return [(x["step"], x["success_sampled"]) for x in run["evals"]]


def _smoothed(name: str) -> Callable[[Record], Curve]:
    """The curve of what a step counts: at each step, the mean of the steps around it."""

    def curve(run: Record) -> Curve:
        counts = torch.tensor([x[name] for x in run["steps"]], dtype=torch.float64)
        windows = (slice(max(i - SMOOTHING, 0), i + SMOOTHING + 1) for i in range(len(counts)))
        return [(i, counts[window].nanmean().item()) for i, window in enumerate(windows)]

    return curve


def _style(phase: str, configuration: Record, seeds: int = 1) -> dict[str, Any]:
    estimator = phase.removesuffix(REPLAY)
    label, colour, _ = STYLES[estimator]
    if estimator == "mapo" and configuration["certainty"] != "quadratic":
        label += f" ({configuration['certainty']})"
    if phase != estimator:
        label += " with replay"
    label += f", mean of {seeds} seeds" if seeds > 1 else ""
    return {"color": colour, "label": label, "linestyle": "-" if phase == estimator else "--"}


def _curves(grouped: Grouped, configuration: Record, panels: list[_Panel]) -> Figure:
    """In each panel, a thin line per seed and a thick one for their mean over the shared steps."""
    figure = Figure(figsize=(2.5 + 5 * len(panels), 4.4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for phase, runs in grouped.items():
            style = _style(phase, configuration, len(runs))
            thin = {**style, "label": None, "alpha": 0.35, "linewidth": 1}
            curves = [panel.curve(run) for run in runs]
            for points in curves if len(curves) > 1 else ():
                ax.plot(*np.transpose(points), **thin)
            shared = min(map(len, curves))
            ax.plot(*np.mean([x[:shared] for x in curves], axis=0).T, **style)
        ax.set(title=panel.title, xlabel="RL step", ylabel=panel.label, ylim=panel.limits)
    axes[0].legend()
    return figure


def _advantages(estimators: list[Any], configuration: Record) -> Figure:
    """lambda(p), and the advantage of a right and of a wrong answer, for binary rewards."""
    size = configuration["group_size"]
    rewards = torch.ones(size + 1, size).tril(-1)  # group k: k ones, then zeros
    figure = Figure(figsize=(12.5, 4.2))
    certainty, right, wrong = figure.subplots(1, 3)
    for estimator in estimators:
        advantages, stats = group_advantages(
            rewards.flatten(),
            group_size=size,
            estimator=estimator,
            certainty=configuration["certainty"],
            return_stats=True,
        )
        style = {**_style(estimator, configuration), "marker": "o"}
        certainty.plot(stats.success_ratio, stats.certainty, **style)
        # The groups that have both right and wrong answers.
        p, mixed = stats.success_ratio[1:-1], advantages.view(size + 1, size)[1:-1]
        right.plot(p, mixed[:, 0], **style)
        wrong.plot(p, mixed[:, -1], **style)
    certainty.set(title="Certainty weight $\\lambda(p)$", ylim=(-0.03, 1.03))
    right.set(title="Advantage of a success", ylim=(0, None))
    wrong.set(title="Advantage of a failure", ylim=(None, 0))
    for ax in (certainty, right, wrong):
        ax.set(xlabel=f"success ratio p of the group ({size} answers)", xlim=(-0.03, 1.03))
    right.legend()
    return figure
