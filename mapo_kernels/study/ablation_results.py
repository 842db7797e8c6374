"""The records of an ablation, sorted into comparisons, and what is missing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mapo_kernels.study.comparisons import Estimate, difference, estimate
from mapo_kernels.study.settings import ESTIMATORS, READ_SUCCESS, REGIMES, SEEDS
from mapo_kernels.study.statistics import area, final_success

Record = dict[str, Any]
BySeed = dict[int, Record]

BASE = "grpo"
REWARD_NAMES = {
    "binary": "binary rewards",
    "partial": "partial rewards",
    "partial-success": "partial rewards with success=",
}
EQUAL = ", equal gradient norms"
MOST_SEEDS = 8  # of the main comparison
MEASURES: dict[str, Callable[[Record], float]] = {"final": final_success, "area": area}
MEASURE_NAMES = {"final": "final success", "area": "mean success over the run"}


class Setting(NamedTuple):
    """What a comparison is made in."""

    stage: str
    regime: str
    reward: str

    @property
    def text(self) -> str:
        """For a sentence."""
        where = f"{self.regime}, {REWARD_NAMES[self.reward]}"
        return where + (EQUAL if self.stage == "norm" else "")


def settings_of_study() -> dict[Setting, tuple[list[str], int]]:
    """Every comparison of the whole study: its estimators, and its number of seeds."""
    every = list(ESTIMATORS)
    found = {
        Setting("main", regime, "binary"): (every, MOST_SEEDS if regime == "mixed" else SEEDS)
        for regime in REGIMES
    }
    found[Setting("main", "mixed", "partial")] = (every, SEEDS)
    found[Setting("main", "mixed", "partial-success")] = (list(READ_SUCCESS), SEEDS)
    for regime in ("hard", "mixed"):
        found[Setting("norm", regime, "binary")] = (every, SEEDS)
    return found


class Ablation:
    """The records that comparisons are made of; those that chose learning rates are no part."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Sort the records by setting, estimator and seed; of a cell twice, the last counts."""
        self.records = list(records)
        self.cells: dict[Setting, dict[str, BySeed]] = {}
        for record in self.records:
            if record["stage"] != "rate":
                setting = Setting(record["stage"], record["regime"], record["reward"])
                of_it = self.cells.setdefault(setting, {})
                of_it.setdefault(record["estimator"], {})[record["seed"]] = record

    def estimators(self, setting: Setting) -> list[str]:
        """Those with at least one run, in the order of the study."""
        return [name for name in ESTIMATORS if name in self.cells.get(setting, {})]

    def values(self, setting: Setting, estimator: str, measure: str) -> dict[int, float]:
        """A number for each seed; none where there are no runs."""
        runs = self.cells.get(setting, {}).get(estimator, {})
        return {seed: MEASURES[measure](record) for seed, record in runs.items()}

    def estimate(self, setting: Setting, estimator: str, measure: str) -> Estimate:
        """Over the seeds of an estimator that has runs."""
        return estimate(self.values(setting, estimator, measure))

    def against(self, setting: Setting, estimator: str, base: str, measure: str) -> Estimate | None:
        """How an estimator differs from another on the same seeds."""
        return self.between((setting, estimator), (setting, base), measure)

    def between(
        self, ours: tuple[Setting, str], theirs: tuple[Setting, str], measure: str
    ) -> Estimate | None:
        """How an estimator in one setting differs from one in another, on the same seeds."""
        return difference(self.values(*ours, measure), self.values(*theirs, measure))

    def missing(self) -> list[str]:
        """What the whole study has and these records have not, one line a setting."""
        lines = []
        for setting, (estimators, seeds) in settings_of_study().items():
            lacking = {
                name: seeds - len(self.cells.get(setting, {}).get(name, {}))
                for name in estimators
                if len(self.cells.get(setting, {}).get(name, {})) < seeds
            }
            if lacking:
                runs, whole = sum(lacking.values()), seeds * len(estimators)
                which = ", ".join(f"{name} {count}" for name, count in lacking.items())
                which = "all" if runs == whole else which
                lines.append(f"{setting.text}: {runs} of {whole} runs ({which})")
        return lines

    def curve(
        self, setting: Setting, estimator: str, what: str
    ) -> tuple[list[int], list[Estimate]]:
        """A quantity over the steps that all seeds share: success, or one of `STEP_LISTS`."""
        by_step: dict[int, dict[int, float]] = {}
        runs = self.cells[setting][estimator]
        for seed, record in runs.items():
            for step, value in _points(record, what):
                if value is not None:
                    by_step.setdefault(step, {})[seed] = value
        steps = [step for step in sorted(by_step) if len(by_step[step]) == len(runs)]
        return steps, [estimate(by_step[step]) for step in steps]


def _points(record: Record, what: str) -> Sequence[tuple[int, float | None]]:
    if what == "held_out":
        return [(x["step"], x["success_sampled"]) for x in record["evals"]]
    lists = record["steps"]
    values = lists[what]
    if what == "groups_without_signal":  # as a share of what was sampled
        values = [
            None if a is None or not b else a / b
            for a, b in zip(values, lists["groups"], strict=True)
        ]
    return list(zip(lists["step"], values, strict=True))
