"""The four figures of the demo, drawn from the log alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mapo_kernels import group_advantages
from mapo_kernels.demo.runs import Record
from mapo_kernels.demo.train import WARM_UP
from mapo_kernels.files import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "mapo": "#d1495b",
    "grpo": "#2e6f95",
    "apd": "#edae49",
    "mean": "#66a182",
    "rloo": "#8d6a9f",
}
LABELS = {"mapo": "MAPO", "grpo": "GRPO", "apd": "APD only", "mean": "r - mean", "rloo": "RLOO"}
STYLE: Any = {
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
BAND_COLOURS = ("#4a4e57", "#d98c5f", "#f2dcb3", "#93c0a4", "#2f6f62")  # from none to all right


def draw_all(log: Record, out: Path) -> list[Path]:
    """Draw every figure that the log has data for; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in log["runs"] if run["phase"] != WARM_UP and run["steps"]]
    figures: tuple[tuple[str, Callable[[Record, list[Record]], Figure]], ...] = (
        ("success.png", _draw_success),
        ("groups_without_signal.png", _draw_silent_groups),
        ("successes_per_group.png", _draw_bands),
        ("advantages.png", _draw_advantages),
    )
    drawn = []
    with plt.rc_context(STYLE):
        for name, draw in figures:
            if runs:
                figure = draw(log, runs)
                write_figure(figure, out / name)
                plt.close(figure)
                drawn.append(out / name)
    return drawn


def _by_estimator(runs: Sequence[Record]) -> dict[str, list[Record]]:
    grouped: dict[str, list[Record]] = {}
    for run in runs:
        grouped.setdefault(run["phase"], []).append(run)
    return grouped


def _label(estimator: str, log: Record, seeds: int) -> str:
    certainty = log["configuration"]["certainty"]
    variant = f" ({certainty})" if estimator == "mapo" and certainty != "quadratic" else ""
    return LABELS[estimator] + variant + (f", mean of {seeds} seeds" if seeds > 1 else "")


def _seed_curves(
    ax: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, label: str, marker: str
) -> None:
    """One thin line per seed and a thick mean over the steps that every seed has."""
    if len(curves) > 1:
        for x, y in curves:
            ax.plot(x, y, color=colour, alpha=0.35, linewidth=1)
    shared = min(len(x) for x, _ in curves)
    center = np.mean([y[:shared] for _, y in curves], axis=0)
    ax.plot(
        curves[0][0][:shared],
        center,
        color=colour,
        linewidth=2.4,
        label=label,
        marker=marker,
        markersize=5,
    )


def _draw_success(log: Record, runs: list[Record]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 4.4))
    for estimator, group in _by_estimator(runs).items():
        curves = [
            (
                np.array([point["step"] for point in run["evals"]]),
                np.array([point["success_sampled"] for point in run["evals"]]),
            )
            for run in group
        ]
        _seed_curves(ax, curves, COLOURS[estimator], _label(estimator, log, len(group)), "o")
    ax.set(xlabel="RL step", ylabel="exactly right answers (temperature 1)", ylim=(0, 1))
    ax.set_title(f"Held-out success: {log['configuration']['task']}", loc="left")
    ax.legend(loc="lower right")
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low = np.maximum(index - SMOOTHING // 2, 0)
    high = np.minimum(index + SMOOTHING // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw_silent_groups(log: Record, runs: list[Record]) -> Figure:
    import matplotlib.pyplot as plt

    groups = log["configuration"]["prompts"]
    figure, ax = plt.subplots(figsize=(7.5, 4.4))
    for estimator, group in _by_estimator(runs).items():
        shares = [
            np.array([record["groups_without_signal"] / groups for record in run["steps"]])
            for run in group
        ]
        if len(shares) == 1:
            ax.plot(shares[0], color=COLOURS[estimator], alpha=0.25, linewidth=0.8)
        curves = [(np.arange(len(share)), _running_mean(share)) for share in shares]
        _seed_curves(ax, curves, COLOURS[estimator], _label(estimator, log, len(group)), "")
    ax.set(xlabel="RL step", ylabel=f"share of {groups} groups", ylim=(0, 1))
    ax.set_title("Groups without signal: all rewards equal, advantage 0", loc="left")
    ax.legend(loc="upper left")
    return figure


def _draw_bands(log: Record, runs: list[Record]) -> Figure:
    """The histogram of successes per group over time, in five bands stacked to 1."""
    import matplotlib.pyplot as plt

    grouped = _by_estimator(runs)
    bands = _bands(log["configuration"]["group_size"])
    width = 4.6 * len(grouped) + 1.6
    figure, axes = plt.subplots(
        1, len(grouped), figsize=(width, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (estimator, group) in zip(axes[0], grouped.items(), strict=True):
        shares = _histogram_shares(group)
        curves = [_running_mean(shares[:, list(counts)].sum(axis=1)) for counts in bands.values()]
        ax.stackplot(np.arange(len(shares)), curves, colors=BAND_COLOURS, labels=list(bands))
        ax.set(xlabel="RL step", xlim=(0, max(len(shares) - 1, 1)), ylim=(0, 1))
        ax.set_title(_label(estimator, log, len(group)), loc="left")
    axes[0][0].set_ylabel("share of groups")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", title="right answers\nin a group"
    )
    return figure


def _bands(size: int) -> dict[str, range]:
    """Numbers of successes by band: the two ends carry no signal, the rest is cut at quarters."""
    low, high = max(size // 4, 1), size - max(size // 4, 1)
    named = (
        ("none", range(0, 1)),
        (f"1 to {low}", range(1, low + 1)),
        (f"{low + 1} to {high - 1}", range(low + 1, high)),
        (f"{high} to {size - 1}", range(max(high, low + 1), size)),
        (f"all {size}", range(size, size + 1)),
    )
    return {name: counts for name, counts in named if counts}


def _histogram_shares(group: Sequence[Record]) -> np.ndarray:
    """[steps, group_size + 1] share of groups, averaged over the seeds that got that far."""
    steps = min(len(run["steps"]) for run in group)
    counts = np.mean(
        [[record["successes_per_group"] for record in run["steps"][:steps]] for run in group],
        axis=0,
    )
    return counts / counts.sum(axis=1, keepdims=True)


def _draw_advantages(log: Record, runs: list[Record]) -> Figure:
    """lambda(p), and the advantage of a right and of a wrong answer, for binary rewards."""
    import matplotlib.pyplot as plt

    size = log["configuration"]["group_size"]
    successes = torch.arange(size + 1)[:, None]
    rewards = (torch.arange(size)[None, :] < successes).float()  # group k: k ones, then zeros
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    for estimator in _by_estimator(runs):
        advantages, stats = group_advantages(
            rewards.flatten(),
            group_size=size,
            estimator=estimator,
            certainty=log["configuration"]["certainty"],
            return_stats=True,
        )
        ratio, table = stats.success_ratio, advantages.view(size + 1, size)
        curves = (
            (ratio, stats.certainty),
            (ratio[1:-1], table[1:-1, 0]),
            (ratio[1:-1], table[1:-1, -1]),
        )
        for ax, (x, y) in zip(axes, curves, strict=True):
            ax.plot(
                x.numpy(),
                y.numpy(),
                color=COLOURS[estimator],
                linewidth=2.2,
                label=_label(estimator, log, 1),
                marker="o",
                markersize=4,
            )
    titles = ("Certainty weight $\\lambda(p)$", "Advantage of a success", "Advantage of a failure")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left")
        ax.set(xlabel=f"success ratio p of the group ({size} answers)", xlim=(-0.03, 1.03))
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(top=0)
    axes[1].legend(loc="upper right")
    return figure
