"""Advantages of several rewards per trajectory (GDPO, arXiv 2601.05242), and for pass@k.

Pass@k training (arXiv 2508.10751) rewards subsets of a group: of all k-subsets, which has reward 1
if one of its trajectories succeeded, R is the mean and sigma the standard deviation. A trajectory's
own reward is the mean over the subsets that it is in, rho. k / G times the sum of rho times the
gradients of the log-probs is an unbiased gradient of pass@k (PKPO, arXiv 2505.15201). With R taken
off, in which each trajectory has a part of k / G, it is (G - k) / G of that.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def pass_at_k(succeeded: Tensor, k: int, c: int) -> tuple[Tensor, float]:
    """Mean reward [G] of the k-subsets that each trajectory is in, and sigma of all k-subsets.

    By counting subsets, in exact arithmetic. A group of fewer than k has one subset, the whole of
    it. sigma is 0 where the number of subsets is no more than c.
    """
    G, successes = len(succeeded), int(succeeded.sum())
    k = min(k, G)
    if G == 0:
        return torch.zeros(0, dtype=torch.float64), 0.0
    subsets = math.comb(G, k)
    fails = Fraction(math.comb(G - successes, k), subsets)
    # The others of a trajectory's subset are k - 1 of G - 1.
    others = Fraction(math.comb(max(G - successes - 1, 0), k - 1), math.comb(G - 1, k - 1))
    rewards = [1.0 if s else float(1 - others) for s in succeeded.tolist()]
    variance = fails * (1 - fails) * subsets / (subsets - c) if subsets > c else Fraction(0)
    return torch.tensor(rewards, dtype=torch.float64), math.sqrt(variance)


def weighted_sum(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Sum [B] in float64 of rewards [B, K] times their weights; NaN where one is not finite.

    A reward of weight 0 plays no part.
    """
    weights = [1.0] * rewards.shape[1] if weights is None else list(weights)
    used = [k for k, w in enumerate(weights) if w != 0]
    total = sum(weights[k] * rewards[:, k].double() for k in used)
    assert isinstance(total, Tensor)
    return torch.where(rewards[:, used].double().isfinite().all(1), total, math.nan)


def normalize_then_sum(
    advantages: Sequence[Tensor], weights: Sequence[float], present: Tensor, c: int, eps: float
) -> Tensor:
    """Advantages [B] from those [B] by each reward: S / (std(S) + eps), S their weighted sum.

    GDPO takes the mean of S over the batch off before it divides. It is 0: in every group each
    reward's advantages sum to 0. `present` [B] says which trajectories the deviation is of.
    """
    S = torch.zeros_like(advantages[0])
    for weight, A in zip(weights, advantages, strict=True):
        S = S + weight * A
    known = S[present]
    std = known.std(correction=c) if len(known) > c else torch.zeros(())
    return S / (std + eps)
