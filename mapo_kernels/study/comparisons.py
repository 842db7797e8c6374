"""Intervals over seeds, and differences of estimators on the same seeds.

As Agarwal et al. advise (arXiv 2108.13264, the library rliable): the interquartile mean over runs,
and percentile bootstrap intervals over seeds. Two estimators are compared seed by seed, since both
start from the same warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
TRIALS = 2000  # of a simulation, with RESAMPLES / 10 each
SEED = 0  # of the resampling: a page that is made again has the same numbers
LEAST = 2  # seeds that an interval takes


class Estimate(NamedTuple):
    """An interquartile mean with its interval, which one seed has not."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and 0 lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def text(self, digits: int = 3, sign: str = "") -> str:
        """The value, and its interval in brackets."""
        value = f"{self.value:{sign}.{digits}f}"
        if self.low is None or self.high is None:
            return f"{value} (one seed)"
        return f"{value} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Along the last axis, without the quarter (rounded down) at each end."""
    cut = values.shape[-1] // 4
    ordered = np.sort(values, axis=-1)
    return ordered[..., cut : values.shape[-1] - cut].mean(axis=-1)


def estimate(by_seed: Mapping[int, float]) -> Estimate:
    """Of the values of one estimator, or of paired differences.

    Args:
        by_seed: one number for each seed, at least one.
    """
    values = np.array([by_seed[seed] for seed in sorted(by_seed)])
    value, n = float(interquartile_mean(values)), len(values)
    if n < LEAST:
        return Estimate(value, None, None, n)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(interquartile_mean(values[_resamples(n)]), (tail, 1 - tail))
    return Estimate(value, float(low), float(high), n)


@cache
def rate_by_chance(seeds: int) -> float:
    """How often an interval excludes 0 where the seeds' differences are normal noise around 0.

    Above 1 - CONFIDENCE: the percentiles of so few seeds are too close together. Simulated.
    """
    noise = np.random.default_rng(SEED).standard_normal((TRIALS, seeds))
    tail = (1 - CONFIDENCE) / 2
    found = 0
    for values in noise:
        means = interquartile_mean(values[_resamples(seeds)[: RESAMPLES // 10]])
        low, high = np.quantile(means, (tail, 1 - tail))
        found += not low <= 0 <= high
    return found / TRIALS


@cache
def _resamples(n: int) -> np.ndarray:
    """[RESAMPLES, n] positions, drawn with replacement."""
    return np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Of what the seeds that both have differ by; None if there are none."""
    shared = ours.keys() & theirs.keys()
    return estimate({seed: ours[seed] - theirs[seed] for seed in shared}) if shared else None
