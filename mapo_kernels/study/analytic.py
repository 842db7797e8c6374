"""What advantages must be, in closed form and plain Python floats; calls nothing of the package.

Symbols as in arXiv 2509.18849: a group of G rewards with mean mu, deviation sigma (divided by
G - c) and success ratio p; lambda(p) is the weight of the percent deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

EPS = 1e-6  # added to both denominators


class Variant(NamedTuple):
    """An estimator of advantages and its lambda(p), as `AdvantageSpec` names them."""

    estimator: str
    certainty: str | float = "quadratic"

    @property
    def settings(self) -> dict[str, Any]:
        """As keywords of `AdvantageSpec` and `group_advantages`."""
        return self._asdict()


VARIANTS = {
    "mapo": Variant("mapo"),
    "mapo-linear": Variant("mapo", "linear"),
    "mapo-entropy": Variant("mapo", "entropy"),
    "mapo-step": Variant("mapo", "step"),
    "mapo-0.5": Variant("mapo", 0.5),
    "grpo": Variant("grpo"),
    "apd": Variant("apd"),
    "mean": Variant("mean"),
    "rloo": Variant("rloo"),
}

# What section 3.2, its figure 3 and the introduction of arXiv 2509.18849 (v3) draw.
HIGH, LOW = "high certainty, one partial", "low certainty"
FAILED = "failed, one without format"
PAPER_GROUPS = {
    HIGH: (0.9, 1.0, 1.0, 1.0),
    LOW: (0.1, 0.1, 1.0, 1.0),
    "low certainty, introduction": (0.1, 0.9, 1.0, 1.0),
    FAILED: (0.0, 0.1, 0.1, 0.1),
}


def certainty(variant: Variant, p: float) -> float:
    """lambda(p), the weight of the percent deviation; 0 for estimators without one."""
    if variant.estimator != "mapo":
        return 1.0 if variant.estimator == "apd" else 0.0
    if not isinstance(variant.certainty, str):
        return variant.certainty
    if variant.certainty == "quadratic":
        return 1 - 4 * p * (1 - p)
    if variant.certainty == "linear":
        return abs(2 * p - 1)
    if variant.certainty == "step":
        return 0.0 if 0.25 <= p <= 0.75 else 1.0
    return 1 + sum(x * math.log2(x) for x in (p, 1 - p) if x > 0)  # entropy


def factor(variant: Variant, mu: float, sigma: float, p: float, size: int) -> float:
    """What r - mu of a group with non-negative rewards, not all equal, is multiplied by."""
    if variant.estimator == "mean":
        return 1.0
    if variant.estimator == "rloo":
        return size / (size - 1)
    weight = certainty(variant, p)
    return (1 - weight) / (sigma + EPS) + weight / (mu + EPS)


def binary(variant: Variant, successes: int, size: int, correction: int) -> tuple[float, float]:
    """The advantages of a success and of a failure where every reward is 0 or 1."""
    p = successes / size
    if p in (0, 1):
        return 0.0, 0.0
    sigma = math.sqrt(p * (1 - p) * size / (size - correction))
    scale = factor(variant, p, sigma, p, size)
    return (1 - p) * scale, -p * scale


def general(variant: Variant, rewards: Sequence[float], correction: int) -> list[float]:
    """The advantages of any non-negative rewards; a success is a reward of 1 or more."""
    size = len(rewards)
    mu = statistics.fmean(rewards)
    if min(rewards) == max(rewards):
        return [0.0] * size
    sigma = math.sqrt(statistics.pvariance(rewards) * size / (size - correction))
    p = sum(r >= 1 for r in rewards) / size
    scale = factor(variant, mu, sigma, p, size)
    return [(r - mu) * scale for r in rewards]


def gradient_scale(variant: Variant, p: float, size: int, correction: int) -> float:
    """rho(p): the size of the gradient of binary rewards over GRPO's (equation 7 for c = 0)."""
    weight = certainty(variant, p)
    sigma = math.sqrt(p * (1 - p) * size / (size - correction))
    return (1 - weight) + weight * (sigma + EPS) / (p + EPS)


def signal_share(p: float, size: int) -> float:
    """The share of groups that have both a success and a failure, each answer succeeding with p."""
    return 1 - (p**size + (1 - p) ** size)


def mean_weight(variant: Variant, p: float, size: int) -> float:
    """The mean of lambda over the groups that have both a success and a failure."""
    counts = range(1, size)
    chances = [math.comb(size, n) * p**n * (1 - p) ** (size - n) for n in counts]
    weights = [certainty(variant, n / size) for n in counts]
    return sum(map(math.prod, zip(chances, weights, strict=True))) / sum(chances)
