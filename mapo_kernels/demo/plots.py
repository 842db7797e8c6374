"""The figures of the demo, drawn from the log alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from mapo_kernels import group_advantages
from mapo_kernels.demo.settings import REPLAY, WARM_UP, Record
from mapo_kernels.demo.styles import SETTINGS, STYLES
from mapo_kernels.files import write_figure

SMOOTHING = 7  # steps on either side, in the running mean over noisy counts
# What evaluations and steps measure: the title of its panel, and the label of its y-axis.
PANELS = {
    "success_sampled": (
        "Held-out success: {task}",
        "exactly right answers (temperature 1, top-p {top_p:g})",
    ),
    "groups_without_signal": (
        "Groups without signal: all rewards equal, advantage 0",
        "groups, of {prompts} in a step",
    ),
    "on_policy_ratio": (
        "Mean importance ratio before any update",
        "new over old probability of a sampled token",
    ),
    "kept_columns": ("Columns kept by top-p", "mean over sampled tokens"),
}


def draw_all(log: Record, out: Path) -> list[Path]:
    """Draw every figure as PNG, if there is a step of RL to draw; returns the files written."""
    configuration = log["configuration"]
    phases: dict[str, list[Record]] = {}
    for run in log["runs"].values():
        if run["phase"] != WARM_UP and run["steps"]:
            phases.setdefault(run["phase"], []).append(run)
    if not phases:
        return []
    panels = {"success": ["success_sampled"], "groups_without_signal": ["groups_without_signal"]}
    if configuration["top_p"] < 1:
        panels["sampling_masks"] = ["on_policy_ratio", "success_sampled", "kept_columns"]
    with matplotlib.rc_context(SETTINGS):
        figures = {name: _curves(phases, x, configuration) for name, x in panels.items()}
        estimators = dict.fromkeys(phase.removesuffix(REPLAY) for phase in phases)
        figures["advantages"] = _advantages(list(estimators), configuration)
        for name, figure in figures.items():
            write_figure(figure, out / f"{name}.png", dpi=120)
    return [out / f"{name}.png" for name in figures]


def _curve(run: Record, name: str) -> Tensor:
    """[points, 2]: steps, and what was measured, of every step as the mean of those around it."""
    if name in run["evals"][0]:
        return torch.tensor([(x["step"], x[name]) for x in run["evals"]], dtype=torch.float64)
    values = torch.tensor([x[name] for x in run["steps"]], dtype=torch.float64)
    padded = pad(values, (SMOOTHING, SMOOTHING), value=torch.nan)
    means = padded.unfold(0, 2 * SMOOTHING + 1, 1).nanmean(dim=1)
    return torch.stack((torch.arange(len(values)), means), dim=1)


def _style(phase: str, configuration: Record, seeds: int = 1) -> dict[str, Any]:
    estimator = phase.removesuffix(REPLAY)
    label, colour, _ = STYLES[estimator]
    if estimator == "mapo" and configuration["certainty"] != "quadratic":
        label += f" ({configuration['certainty']})"
    if phase != estimator:
        label += " with replay"
    label += f", mean of {seeds} seeds" if seeds > 1 else ""
    return {"color": colour, "label": label, "linestyle": "-" if phase == estimator else "--"}


def _curves(
    phases: dict[str, list[Record]], panels: Sequence[str], configuration: Record
) -> Figure:
    """In each panel, a thin line per seed and a thick one for their mean over the shared steps."""
    figure = Figure(figsize=(2.5 + 5 * len(panels), 4.4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    limits = {"success_sampled": (0, 1), "groups_without_signal": (0, configuration["prompts"])}
    for ax, name in zip(axes, panels, strict=True):
        for phase, runs in phases.items():
            style = _style(phase, configuration, len(runs))
            curves = [_curve(run, name) for run in runs]
            for points in curves if len(curves) > 1 else ():
                ax.plot(*points.T, **{**style, "label": None, "alpha": 0.35, "linewidth": 1})
            shared = min(map(len, curves))
            ax.plot(*torch.stack([points[:shared] for points in curves]).mean(0).T, **style)
        title, label = (text.format(**configuration) for text in PANELS[name])
        ax.set(title=title, xlabel="RL step", ylabel=label, ylim=limits.get(name))
    axes[0].legend()
    return figure


def _advantages(estimators: Sequence[Any], configuration: Record) -> Figure:
    """lambda(p), and the advantage of a right and of a wrong answer, for binary rewards."""
    size = configuration["group_size"]
    rewards = torch.ones(size + 1, size).tril(-1)  # group k: k ones, then zeros
    figure = Figure(figsize=(12.5, 4.2))
    certainty, right, wrong = axes = figure.subplots(1, 3)
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
    for ax in axes:
        ax.set(xlabel=f"success ratio p of the group ({size} answers)", xlim=(-0.03, 1.03))
    right.legend()
    return figure
