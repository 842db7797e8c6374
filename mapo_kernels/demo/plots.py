"""The three figures of the demo, drawn from the log alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from mapo_kernels import group_advantages
from mapo_kernels.demo.settings import WARM_UP, Record
from mapo_kernels.files import write_figure

STYLES = {  # label and colour
    "mapo": ("MAPO", "#d1495b"),
    "grpo": ("GRPO", "#2e6f95"),
    "apd": ("APD only", "#edae49"),
    "mean": ("r - mean", "#66a182"),
    "rloo": ("RLOO", "#8d6a9f"),
}
SETTINGS: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.4,
    "legend.frameon": False,
    "lines.linewidth": 2.3,
    "lines.markersize": 4,
}
SMOOTHING = 7  # steps on either side, in the running mean over noisy counts

Grouped = dict[str, list[Record]]  # the runs of each estimator
Curve = list[tuple[int, float]]  # (step, value)


def draw_all(log: Record, out: Path) -> list[Path]:
    """Draw every figure as PNG, if there is a step of RL to draw; returns the files written."""
    configuration = log["configuration"]
    grouped: Grouped = {}
    for run in log["runs"].values():
        if run["phase"] != WARM_UP and run["steps"]:
            grouped.setdefault(run["phase"], []).append(run)
    if not grouped:
        return []
    groups = configuration["prompts"]
    with matplotlib.rc_context(SETTINGS):
        figures = {
            "success": _curves(grouped, configuration, _success),
            "groups_without_signal": _curves(grouped, configuration, _silent_groups),
            "advantages": _advantages(list(grouped), configuration),
        }
        title = f"Held-out success: {configuration['task']}"
        label = "exactly right answers (temperature 1)"
        figures["success"].gca().set(title=title, ylabel=label, ylim=(0, 1))
        title = "Groups without signal: all rewards equal, advantage 0"
        label, limits = f"groups, of {groups} in a step", (0, groups)
        figures["groups_without_signal"].gca().set(title=title, ylabel=label, ylim=limits)
        for name, figure in figures.items():
            write_figure(figure, out / f"{name}.png", dpi=120)
    return [out / f"{name}.png" for name in figures]


def _success(run: Record) -> Curve:
    return [(x["step"], x["success_sampled"]) for x in run["evals"]]


def _silent_groups(run: Record) -> Curve:
    """At each step, the mean of the steps around it."""
    counts = [x["groups_without_signal"] for x in run["steps"]]
    windows = (slice(max(i - SMOOTHING, 0), i + SMOOTHING + 1) for i in range(len(counts)))
    return [(i, mean(counts[window])) for i, window in enumerate(windows)]


def _style(estimator: str, configuration: Record, seeds: int = 1) -> dict[str, Any]:
    label, colour = STYLES[estimator]
    if estimator == "mapo" and configuration["certainty"] != "quadratic":
        label += f" ({configuration['certainty']})"
    return {"color": colour, "label": label + (f", mean of {seeds} seeds" if seeds > 1 else "")}


def _curves(grouped: Grouped, configuration: Record, curve: Callable[[Record], Curve]) -> Figure:
    """A thin line per seed, and a thick one for the mean over the steps that all have."""
    figure = Figure(figsize=(7.5, 4.4))
    ax = figure.subplots()
    for estimator, runs in grouped.items():
        style = _style(estimator, configuration, len(runs))
        curves = [curve(run) for run in runs]
        for points in curves if len(curves) > 1 else ():
            ax.plot(*np.transpose(points), color=style["color"], alpha=0.35, linewidth=1)
        shared = min(map(len, curves))
        ax.plot(*np.mean([x[:shared] for x in curves], axis=0).T, **style)
    ax.set_xlabel("RL step")
    ax.legend()
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
