"""Group advantages of MAPO (arXiv 2509.18849) and of the estimators it is compared with.

Notation of the paper, for one group (the G trajectories of one prompt) with rewards r_1 .. r_G:

    mu, sigma   mean and standard deviation of the rewards
    p           success ratio, the fraction of successful trajectories
    z_i         (r_i - mu) / (sigma + eps), the z-score of GRPO
    APD_i       (r_i - mu) / (D + eps), Advantage Percent Deviation; D = mu in the paper
    lambda(p)   1 - 4 p (1 - p), Trajectory Certainty Reweight
    A_i         (1 - lambda(p)) z_i + lambda(p) APD_i, the mixed advantage
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference.objectives import normalize_then_sum, weighted_sum
from reference.objectives import pass_at_k as rewards_of_subsets


@dataclass(frozen=True)
class GroupStats:
    """Statistics of one group, over its finite rewards only.

    Attributes:
        mean: mu; 0 if the group has no finite reward.
        std: sigma with the requested correction; exactly 0 where no advantage can be formed.
        success_ratio: p; 0 if the group has no finite reward.
        certainty: lambda(p) of the requested certainty function, whichever estimator is in use.
        size: G, the number of finite rewards.
        nonfinite: number of NaN and infinite rewards, which G does not count.
    """

    mean: float
    std: float
    success_ratio: float
    certainty: float
    size: int
    nonfinite: int


def certainty_weight(p: float, certainty: str | float = "quadratic") -> float:
    """Weight lambda of the Advantage Percent Deviation in a group with success ratio p.

    Args:
        p: success ratio in [0, 1].
        certainty: "quadratic" (the paper), "linear", "entropy", "step", or a number in [0, 1].

    Raises:
        ValueError: if `certainty` is none of these.
    """
    if certainty == "quadratic":
        return 1 - 4 * p * (1 - p)
    if certainty == "linear":
        return abs(2 * p - 1)
    if certainty == "entropy":
        return 1 - sum(-q * math.log2(q) for q in (p, 1 - p) if q > 0)
    if certainty == "step":
        return 0.0 if 0.25 <= p <= 0.75 else 1.0
    if not isinstance(certainty, str) and 0 <= certainty <= 1:
        return float(certainty)
    raise ValueError(
        "certainty: expected quadratic, linear, entropy, step or a number in [0, 1], "
        f"got {certainty!r}"
    )


def has_signal(r: Tensor, c: int) -> bool:
    """Whether advantages can be formed from the finite rewards r [G] of a group.

    Equality of rewards is tested on the rewards: sigma of equal rewards may be a rounding error
    above 0, and dividing that error by itself would invent a signal.
    """
    G = len(r)
    return G > max(c, 0) and bool(r.max() > r.min())


def standard_deviation(r: Tensor, c: int) -> Tensor:
    """Standard deviation of r [G] with the sum of squares divided by G - c."""
    return (((r - r.mean()) ** 2).sum() / (len(r) - c)).sqrt()


def group_stats(r: Tensor, succeeded: Tensor, nonfinite: int, certainty, c: int) -> GroupStats:
    """Statistics of one group from its finite rewards r [G] and their successes [G]."""
    G = len(r)
    p = int(succeeded.sum()) / G if G > 0 else 0.0
    return GroupStats(
        mean=float(r.mean()) if G > 0 else 0.0,
        std=float(standard_deviation(r, c)) if has_signal(r, c) else 0.0,
        success_ratio=p,
        certainty=certainty_weight(p, certainty),
        size=G,
        nonfinite=nonfinite,
    )


def percent_deviation(r: Tensor, eps: float, apd: str) -> Tensor:
    """Advantage Percent Deviation of the rewards r [G] of one group.

    "paper" divides by mu, which explodes at mu = 0 and flips the ranking when mu < 0. "bounded"
    divides by the smallest D >= abs(mu) that keeps abs(APD) <= G - 1. When no reward is negative,
    abs(r_i - mu) <= (G - 1) mu, so that D is mu and nothing of the paper changes.
    """
    G, mu = len(r), r.mean()
    if apd == "paper":
        D = mu
    elif apd == "bounded":
        D = torch.maximum(mu.abs(), (r - mu).abs().max() / (G - 1))
    else:
        raise ValueError(f"apd: expected bounded or paper, got {apd!r}")
    return (r - mu) / (D + eps)


def estimate(
    r: Tensor,
    lam: float,
    estimator: str,
    c: int,
    eps: float,
    apd: str,
    scale: float | None = None,
    std: float | None = None,
    k: int = 1,
) -> Tensor:
    """Advantages [G] of one group from its finite rewards r [G] and its certainty weight lam.

    `scale` is what the z-score divides by, eps included; None for the deviation `std`, by default
    that of r.
    """
    if not has_signal(r, c):
        return torch.zeros_like(r)
    G, mu = len(r), r.mean()
    if estimator == "mean":  # Dr.GRPO
        return r - mu
    if estimator == "rloo":  # r_i minus the mean of the others; of subsets of k, see `pass_at_k`
        return (r - mu) * G / max(G - k, 1)
    if estimator == "apd":
        return percent_deviation(r, eps, apd)
    if scale is None:
        scale = eps + (float(standard_deviation(r, c)) if std is None else std)
    z = (r - mu) / scale
    if estimator == "grpo":
        return z
    if estimator == "mapo":
        return (1 - lam) * z + lam * percent_deviation(r, eps, apd)
    raise ValueError(f"estimator: expected mapo, grpo, apd, mean or rloo, got {estimator!r}")


def difficulty_weight(p: float, difficulty: str | None, exponent: float) -> float:
    """Factor of the advantages of a group with success ratio p.

    "focal" is (1 - p)^exponent (F-GRPO, arXiv 2602.06717), "power" p^(-exponent) (A-GRAE, arXiv
    2602.05548, with 1/2 and without its constant 0.5). A power of 0 that is infinite counts as 1.
    """
    if difficulty is None:
        return 1.0
    base, power = {"focal": (1 - p, exponent), "power": (p, -exponent)}[difficulty]
    return 1.0 if base == 0 and power < 0 else base**power


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "mapo",
    certainty: str | float = "quadratic",
    success: Tensor | None = None,
    success_threshold: float = 1.0,
    std_correction: int = 1,
    eps: float = 1e-6,
    apd: str = "bounded",
    max_abs: float | None = None,
    difficulty: str | None = None,
    difficulty_exponent: float = 0.5,
    scale: str = "group",
    batch_std: float | None = None,
    group_weight: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    multi_objective_aggregation: str = "sum_then_normalize",
    pass_at_k: int | None = None,
) -> tuple[Tensor, dict[int, GroupStats]]:
    """One advantage per trajectory, from the rewards of its group.

    A NaN or infinite reward is absent from its group's statistics and gets advantage 0. A group
    has advantages of exactly 0 if its finite rewards are all equal or if G <= std_correction.

    Args:
        rewards: [B], or [B, K] of any floating dtype.
        group_ids: [B] integers, in any order; groups may differ in size.
        estimator: "mapo", "grpo", "apd", "mean" or "rloo".
        certainty: lambda(p), see `certainty_weight`.
        success: [B] bool, which trajectories succeeded; by default `rewards >= success_threshold`.
        success_threshold: compared in the dtype of `rewards`, as PyTorch compares with a number:
            a float32 reward of 0.9 passes a threshold of 0.9.
        std_correction: sigma divides by G - std_correction (1: TRL, verl and the authors' code;
            0: the worked figures of the paper).
        eps: added to the denominators of z and APD.
        apd: "bounded" or "paper", see `percent_deviation`.
        max_abs: clamp advantages to [-max_abs, max_abs].
        difficulty: None, "focal" or "power", see `difficulty_weight`.
        difficulty_exponent: see there.
        scale: what the z-score divides by: "group", the group's own deviation; "batch", that of all
            finite rewards with the same correction; "none", 1.
        batch_std: that of all rewards, where only some of them are given.
        group_weight: [B], factor of each row's advantage before that clamp.
        reward_weights: K factors of the rewards [B, K], by default 1.
        multi_objective_aggregation: "sum_then_normalize", or "normalize_then_sum" for advantages by
            each reward, whose weighted sum is divided by its deviation over the batch.
        pass_at_k: the rewards are those of k-subsets, see `objectives.pass_at_k`.

    Returns:
        Advantages [B] in float64, and the statistics of each group by its id.
    """
    if multi_objective_aggregation == "normalize_then_sum":
        settings = {
            "estimator": estimator, "certainty": certainty, "std_correction": std_correction,
            "eps": eps, "apd": apd, "difficulty": difficulty,
            "difficulty_exponent": difficulty_exponent,
        }  # fmt: skip
        return _normalized_then_summed(
            rewards if rewards.dim() == 2 else rewards[:, None], group_ids, reward_weights,
            success, success_threshold, max_abs, group_weight, settings,
        )  # fmt: skip
    if rewards.dim() == 2:
        success = _succeeded(rewards, reward_weights, success, success_threshold)
        rewards = weighted_sum(rewards, reward_weights)
    succeeded = rewards >= success_threshold if success is None else success.bool()
    r = rewards.detach().double()
    A = torch.zeros_like(r)
    stats = {}
    divisor = None
    if scale == "batch":
        known = r[r.isfinite()]
        if batch_std is None and len(known) > std_correction:
            batch_std = float(standard_deviation(known, std_correction))
        divisor = (batch_std or 0.0) + eps
    elif scale == "none":
        divisor = 1.0
    for group_id in group_ids.unique().tolist():
        members = group_ids == group_id
        finite = members & r.isfinite()
        stats[group_id] = group_stats(
            r[finite],
            succeeded[finite],
            nonfinite=int(members.sum() - finite.sum()),
            certainty={"mapo": certainty, "apd": 1.0}.get(estimator, 0.0),
            c=std_correction,
        )
        lam = stats[group_id].certainty
        own, std = r[finite], None
        if pass_at_k is not None:
            own, std = rewards_of_subsets(succeeded[finite], pass_at_k, std_correction)
            mean = float(own.mean()) if len(own) else 0.0
            stats[group_id] = replace(stats[group_id], mean=mean, std=std)
        k = pass_at_k or 1
        A[finite] = estimate(own, lam, estimator, std_correction, eps, apd, divisor, std, k)
        p = stats[group_id].success_ratio
        A[finite] *= difficulty_weight(p, difficulty, difficulty_exponent)
    if group_weight is not None:
        for i in range(len(A)):
            if A[i] != 0:
                A[i] *= group_weight[i].double()
    return (A if max_abs is None else A.clamp(-max_abs, max_abs)), stats


def _succeeded(
    rewards: Tensor, weights: Sequence[float] | None, success: Tensor | None, threshold: float
) -> Tensor:
    """Successes [B] of rewards [B, K]: by their weighted sum, rounded to the rewards' dtype."""
    if success is not None:
        return success.bool()
    total = weighted_sum(rewards, weights)
    return (total.to(rewards.dtype) if rewards.is_floating_point() else total) >= threshold


def _normalized_then_summed(
    rewards: Tensor,
    group_ids: Tensor,
    weights: Sequence[float] | None,
    success: Tensor | None,
    threshold: float,
    max_abs: float | None,
    group_weight: Tensor | None,
    settings: dict,
) -> tuple[Tensor, dict[int, GroupStats]]:
    """What `group_advantages` returns, of rewards [B, K] that have advantages of their own."""
    weights = [1.0] * rewards.shape[1] if weights is None else list(weights)
    success = _succeeded(rewards, weights, success, threshold)
    total = weighted_sum(rewards, weights)
    _, stats = group_advantages(total, group_ids, success=success, **settings)
    present = total.isfinite()
    used = [k for k, w in enumerate(weights) if w != 0]
    parts = [
        group_advantages(
            torch.where(present, rewards[:, k].double(), math.nan),
            group_ids,
            success=success,
            **settings,
        )[0]
        for k in used
    ]
    A = normalize_then_sum(
        parts,
        [weights[k] for k in used],
        present,
        settings["std_correction"],
        settings["eps"],
    )
    A = A if group_weight is None else torch.where(A != 0, A * group_weight.double(), A)
    return (A if max_abs is None else A.clamp(-max_abs, max_abs)), stats
