"""The four figures of the demo, drawn from the log alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mapo_kernels import group_advantages
from mapo_kernels.demo.folder import Record
from mapo_kernels.demo.settings import WARM_UP
from mapo_kernels.files import write_figure

STYLES = {  # label and colour
    "mapo": ("MAPO", "#d1495b"),
    "grpo": ("GRPO", "#2e6f95"),
    "apd": ("APD only", "#edae49"),
    "mean": ("r - mean", "#66a182"),
    "rloo": ("RLOO", "#8d6a9f"),
}
SETTINGS: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 120,
    "savefig.bbox": "tight",
}
SMOOTHING = 15  # steps in the running mean over noisy per-step shares

Grouped = dict[str, list[Record]]  # the runs of each estimator


def draw_all(log: Record, out: Path) -> list[Path]:
    """Draw every figure that the log has data for; returns the files written."""
    grouped: Grouped = {}
    for run in log["runs"]:
        if run["phase"] != WARM_UP and run["steps"]:
            grouped.setdefault(run["phase"], []).append(run)
    figures: dict[str, Callable[[Record, Grouped], Figure]] = {
        "success.png": _draw_success,
        "groups_without_signal.png": _draw_silent_groups,
        "successes_per_group.png": _draw_histograms,
        "advantages.png": _draw_advantages,
    }
    drawn = []
    with matplotlib.rc_context(SETTINGS):
        for name, draw in figures.items():
            if grouped:
                write_figure(draw(log, grouped), out / name)
                drawn.append(out / name)
    return drawn


def _label(estimator: str, log: Record, seeds: int = 1) -> str:
    certainty = log["configuration"]["certainty"]
    variant = f" ({certainty})" if estimator == "mapo" and certainty != "quadratic" else ""
    return STYLES[estimator][0] + variant + (f", mean of {seeds} seeds" if seeds > 1 else "")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends."""
    half = SMOOTHING // 2
    sums, counts = (
        np.convolve(x, np.ones(SMOOTHING))[half : half + len(x)]
        for x in (values, np.ones(len(values)))
    )
    return sums / counts


def _draw_seeds(
    log: Record, grouped: Grouped, curve: Callable[[Record], Any], marker: str = ""
) -> tuple[Figure, Any]:
    """One thin line per seed and a thick mean over the steps that every seed has.

    `curve` makes the [2, points] steps and values of a run.
    """
    figure = Figure(figsize=(7.5, 4.4))
    ax = figure.subplots()
    for estimator, runs in grouped.items():
        colour, curves = STYLES[estimator][1], [curve(run) for run in runs]
        if len(curves) > 1:
            for x, y in curves:
                ax.plot(x, y, color=colour, alpha=0.35, linewidth=1)
        shared = min(len(x) for x, _ in curves)
        x, y = np.mean([(x[:shared], y[:shared]) for x, y in curves], axis=0)
        style: Any = {"color": colour, "linewidth": 2.4, "marker": marker, "markersize": 5}
        ax.plot(x, y, label=_label(estimator, log, len(runs)), **style)
    ax.set(xlabel="RL step", ylim=(0, 1))
    return figure, ax


def _draw_success(log: Record, grouped: Grouped) -> Figure:
    def curve(run: Record) -> Any:
        return np.transpose([(point["step"], point["success_sampled"]) for point in run["evals"]])

    figure, ax = _draw_seeds(log, grouped, curve, "o")
    ax.set_ylabel("exactly right answers (temperature 1)")
    ax.set_title(f"Held-out success: {log['configuration']['task']}", loc="left")
    ax.legend(loc="lower right")
    return figure


def _draw_silent_groups(log: Record, grouped: Grouped) -> Figure:
    groups = log["configuration"]["prompts"]

    def curve(run: Record) -> Any:
        counts = np.array([record["groups_without_signal"] for record in run["steps"]])
        return np.arange(len(counts)), _running_mean(counts / groups)

    figure, ax = _draw_seeds(log, grouped, curve)
    ax.set_ylabel(f"share of {groups} groups")
    ax.set_title("Groups without signal: all rewards equal, advantage 0", loc="left")
    ax.legend(loc="upper left")
    return figure


def _draw_histograms(log: Record, grouped: Grouped) -> Figure:
    """The histogram of right answers per group over time, stacked to 1: the mean over seeds."""
    size = log["configuration"]["group_size"]
    colours = ScalarMappable(Normalize(0, size), "RdYlBu")
    figure = Figure(figsize=(4.6 * len(grouped) + 1.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(grouped), sharey=True, squeeze=False)[0]
    for ax, (estimator, runs) in zip(axes, grouped.items(), strict=True):
        steps = min(len(run["steps"]) for run in runs)
        counts = np.mean(
            [[record["successes_per_group"] for record in run["steps"][:steps]] for run in runs],
            axis=0,
        )  # [steps, size + 1]
        shares = [_running_mean(column) for column in (counts / counts.sum(1, keepdims=True)).T]
        ax.stackplot(np.arange(steps), shares, colors=colours.to_rgba(np.arange(size + 1)))
        ax.set(xlabel="RL step", xlim=(0, max(steps - 1, 1)), ylim=(0, 1))
        ax.set_title(_label(estimator, log, len(runs)), loc="left")
    axes[0].set_ylabel("share of groups")
    figure.colorbar(colours, ax=axes, label=f"right answers in a group of {size}")
    return figure


def _draw_advantages(log: Record, grouped: Grouped) -> Figure:
    """lambda(p), and the advantage of a right and of a wrong answer, for binary rewards."""
    size = log["configuration"]["group_size"]
    successes = torch.arange(size + 1)[:, None]
    rewards = (torch.arange(size)[None, :] < successes).float()  # group k: k ones, then zeros
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for estimator in grouped:
        advantages, stats = group_advantages(
            rewards.flatten(),
            group_size=size,
            estimator=estimator,
            certainty=log["configuration"]["certainty"],
            return_stats=True,
        )
        ratio, table = stats.success_ratio, advantages.view(size + 1, size)
        inner = slice(1, -1)  # the groups that have both right and wrong answers
        style: Any = {
            "color": STYLES[estimator][1],
            "linewidth": 2.2,
            "label": _label(estimator, log),
        }
        style |= {"marker": "o", "markersize": 4}
        axes[0].plot(ratio, stats.certainty, **style)
        axes[1].plot(ratio[inner], table[inner, 0], **style)
        axes[2].plot(ratio[inner], table[inner, -1], **style)
    titles = ("Certainty weight $\\lambda(p)$", "Advantage of a success", "Advantage of a failure")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left")
        ax.set(xlabel=f"success ratio p of the group ({size} answers)", xlim=(-0.03, 1.03))
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(top=0)
    axes[1].legend(loc="upper right")
    return figure
