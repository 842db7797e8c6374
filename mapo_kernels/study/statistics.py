"""What the records of the ablation come to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

Record = dict[str, Any]


def final_success(record: Record) -> float:
    """Sampled success on held-out problems after the last step."""
    return record["evals"][-1]["success_sampled"]


def area(record: Record) -> float:
    """Mean sampled success over the steps of a run: the area under its curve, over its length."""
    evals = record["evals"]
    steps = np.array([x["step"] for x in evals], dtype=float)
    success = np.array([x["success_sampled"] for x in evals])
    if len(evals) == 1:
        return float(success[0])
    heights = (success[1:] + success[:-1]) / 2
    return float((heights * np.diff(steps)).sum() / (steps[-1] - steps[0]))


def chosen_rates(records: Iterable[Record], regime: str) -> dict[str, float]:
    """The learning rate of each estimator with the largest area under the curve, mean over seeds.

    Of equal ones the smallest. Only the stage `rate` decides, whose seeds no comparison uses.
    """
    areas: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["stage"] == "rate" and record["regime"] == regime:
            areas[record["estimator"]][record["learning_rate"]].append(area(record))
    return {
        estimator: max(sorted(by_rate), key=lambda rate: float(np.mean(by_rate[rate])))
        for estimator, by_rate in areas.items()
    }
