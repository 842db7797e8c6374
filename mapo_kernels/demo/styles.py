"""Labels and colours of estimators, and the look of plots: the same in demo and study."""

from __future__ import annotations

from typing import Any, NamedTuple


class Style(NamedTuple):
    """How an estimator is named and drawn."""

    label: str
    colour: str
    marker: str = "o"


STYLES = {
    "mapo": Style("MAPO", "#d1495b"),
    "mapo-linear": Style("MAPO linear", "#f08a5d", "v"),
    "mapo-entropy": Style("MAPO entropy", "#7a1f3d", "^"),
    "mapo-step": Style("MAPO step", "#ff9eb5", "s"),
    "mapo-0.5": Style("MAPO 0.5", "#9c6644", "D"),
    "grpo": Style("GRPO", "#2e6f95", "P"),
    "dapo": Style("GRPO + DAPO", "#4cc9f0", "X"),
    "apd": Style("APD only", "#edae49", "<"),
    "mean": Style("r - mean", "#66a182", ">"),
    "rloo": Style("RLOO", "#8d6a9f", "h"),
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
