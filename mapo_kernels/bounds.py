"""Which tokens have left a bound: device functions, as in `formula`, whose source is read likewise.

They are constants of the loss: nothing is differentiated through a bound.
"""

from typing import Any, NamedTuple

from mapo_kernels._triton import jit, tl
from mapo_kernels.numerics import clamp, exp, k3


class RolloutMetrics(NamedTuple):
    """The table of metrics about the sampling engine's policy: means over valid tokens.

    But for those of `LARGEST_OF_ROLLOUT`, which come last.
    """

    rollout_masked_fraction: Any
    rollout_ratio_mean: Any
    rollout_kl: Any
    rollout_ratio_max: Any


LARGEST_OF_ROLLOUT = ("rollout_ratio_max",)


@jit
def rollout_ratio(log_ratio):
    """Of log ratios clamped to +-20: the ratio, and the k3 estimate of KL(rollout || old)."""
    ratio = exp(log_ratio)
    return ratio, k3(log_ratio, ratio)


@jit
def outside(ratio, low, high):
    """Which ratios lie outside [low, high]; a NaN does not, so that the loss shows it."""
    return (ratio < low) | (ratio > high)


@jit
def other_probability(logp, probability):
    """1 - p from log p and p, with all its digits where p is nearly 1."""
    return clamp(-(k3(logp, probability) + logp), 0.0, 1.0)


@jit
def outside_trust_region(logp, old_logp, advantage, numbers, LOSS: tl.constexpr):
    """Which tokens have left the trust region in the direction that their advantage pushes.

    DPPO (arXiv 2602.04879), its binary divergences of the sampled token's probabilities p (new) and
    q (old): `tv` |p - q|, `kl` q log(q / p) + (1 - q) log((1 - q) / (1 - p)), both complements with
    1e-8 added as in verl's `dppo_kl`. A NaN is inside, so that the loss shows it.
    Returns (left below with a negative advantage, left above with a positive one).
    """
    p = exp(logp)
    q = exp(old_logp)
    if LOSS.trust_region == "tv":
        low = q - p > numbers.trust_low
        high = p - q > numbers.trust_high
    else:
        other_q = other_probability(old_logp, q)
        odds = (other_q + 1e-8) / (other_probability(logp, p) + 1e-8)
        # q log q is 0 at q = 0, where the logarithm is infinite.
        kl = tl.where(q > 0, q * (old_logp - logp), 0.0) + other_q * tl.log(odds)
        low = (kl > numbers.trust_low) & (p < q)
        high = (kl > numbers.trust_high) & (p > q)
    return low & (advantage < 0), high & (advantage > 0)
