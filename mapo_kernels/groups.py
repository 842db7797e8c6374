"""Groups of rewards: their statistics and metrics, and the dtype that these have."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch

from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.eager.sums import accumulator_dtype, row_sum
from mapo_kernels.spec import AdvantageSpec


class GroupStats(NamedTuple):
    """Statistics per group, [Q] tensors: groups by position, or by ascending id for `group_ids`.

    Ids of uint64 from 2^63 on come first, as the negative numbers that their bits are in int64.

    Attributes:
        mean: mu, mean of the group's finite rewards, of several the weighted sums; with `pass_at_k`
            the share of its k-subsets that have a success.
        std: sigma, the deviation of the same, with the correction of the spec.
        success_ratio: p, share of successes among the finite rewards.
        certainty: lambda(p), the weight of the percent deviation.
        size: number of finite rewards.
        nonfinite: number of NaN or infinite rewards.
    """

    mean: torch.Tensor
    std: torch.Tensor
    success_ratio: torch.Tensor
    certainty: torch.Tensor
    size: torch.Tensor
    nonfinite: torch.Tensor


class Signal(NamedTuple):
    """What the rewards of a batch come to.

    Attributes:
        advantages: [B].
        metrics: 0-d tensors about the groups, some of `GROUP_METRICS`; empty if advantages were
            given.
        never_successful: [1], not 0 if rewards differ and none was a success; None if not known.
    """

    advantages: torch.Tensor
    metrics: dict[str, torch.Tensor] = {}  # noqa: RUF012  never written to
    never_successful: torch.Tensor | None = None

    def of_rows(self, rows: Any, device: torch.device | None = None) -> Signal:
        """The same of some of the sequences (or tokens), with the metrics of all groups."""
        values = {k: x.to(device or x.device) for k, x in self.metrics.items()}
        advantages = self.advantages[rows].to(device or self.advantages.device)
        return Signal(advantages, values, self.never_successful)


_has_warned = False
_has_warned_of_single = False


def threshold_decides(spec: AdvantageSpec, success: torch.Tensor | None) -> bool:
    """Whether the advantages depend on which rewards reach the threshold."""
    return success is None and _needs_success(spec)


def _needs_success(spec: AdvantageSpec) -> bool:
    return spec.certainty_mode != "fixed" or spec.difficulty is not None


def warn_of_threshold(spec: AdvantageSpec) -> None:
    """Say, once in a process, that no reward of a batch reached the threshold."""
    global _has_warned
    if _has_warned or not _needs_success(spec):
        return
    _has_warned = True
    says = []
    if spec.certainty_mode != "fixed":
        says.append("its certainty lambda is that of p = 0 (1 in the paper: the percent deviation)")
    if spec.difficulty is not None:
        says.append("its difficulty is that of p = 0")
    warnings.warn(
        f"success_threshold: no reward of this batch reached {spec.success_threshold:g}, though "
        f"rewards differ. Every group then counts as failed, and {' and '.join(says)}. If some of "
        f"these sequences did succeed, lower success_threshold, or pass success= (in MAPOConfig: "
        f"success_reward).",
        stacklevel=3,
    )


def forget_warnings() -> None:
    """Warn again of what was warned of already: for tests."""
    global _has_warned, _has_warned_of_single
    _has_warned = _has_warned_of_single = False


# What float32 holds exactly. A kernel compares such rewards with the threshold as they are.
_NARROW = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
)


def decide_rewards(groups: GroupInputs, spec: AdvantageSpec) -> GroupInputs:
    """Rewards in the dtype that their statistics have, and success from before any rounding.

    The one place that knows the rule: statistics are float32, unless every input of a call is
    float64 (`groups.wide`); a reward is a success if it reaches the threshold in its own dtype.
    The deviation of the whole batch's rewards comes with them where the spec divides by it.
    """
    groups = _decided(summed(groups, spec), spec)
    if spec.pass_at_k is not None:
        groups = _as_successes(groups, spec)
    if spec.scale != "batch" or groups.batch_std is not None:
        return groups
    dtype = torch.float64 if groups.wide else torch.float32
    return replaced(groups, batch_std=batch_deviation(groups.rewards, spec.std_correction, dtype))


def _decided(groups: GroupInputs, spec: AdvantageSpec) -> GroupInputs:
    rewards, success = groups.rewards, groups.success
    if groups.wide or rewards.dtype in _NARROW:
        return groups
    if success is None:
        success = successes_of(rewards, spec)
    if rewards.dtype == torch.float64:
        # What is finite stays so.
        limit = torch.finfo(torch.float32).max
        rewards = rewards.clamp(-limit, limit).where(rewards.isfinite(), rewards)
    return replaced(groups, rewards=rewards.to(torch.float32), success=success)


def weighted_columns(
    rewards: torch.Tensor, spec: AdvantageSpec
) -> list[tuple[float, torch.Tensor]]:
    """Weight and wide [B] of each reward that has a part in the sum."""
    wide = rewards.to(accumulator_dtype(rewards.device))
    # None for a single one.
    weights = spec.reward_weights or (1.0,)
    return [(w, wide[:, k]) for k, w in enumerate(weights) if w != 0]


def summed(groups: GroupInputs, spec: AdvantageSpec) -> GroupInputs:
    """The groups with the weighted sum of the rewards [B, K] of each sequence for its reward [B].

    NaN where one of them is not finite. The sum is rounded to the rewards' dtype to be compared
    with the threshold, and else no more than statistics are.
    """
    rewards = groups.rewards
    if rewards.dim() == 1:
        return groups
    if rewards.shape[1] == 1 and spec.reward_weights in (None, (1.0,)):
        # As it is, and compared with the threshold where others are.
        return replaced(groups, rewards=rewards[:, 0])
    total, finite = None, None
    for weight, column in weighted_columns(rewards, spec):
        term, is_known = weight * column, column.isfinite()
        total = term if total is None else total + term
        finite = is_known if finite is None else finite & is_known
    assert total is not None and finite is not None
    limit = torch.finfo(total.dtype).max
    total = total.clamp(-limit, limit).where(finite, float("nan"))
    success = groups.success
    if success is None:
        own = total.to(rewards.dtype) if rewards.dtype.is_floating_point else total
        success = successes_of(own, spec)
    return replaced(groups, rewards=total, success=success)


def successes_of(rewards: torch.Tensor, spec: AdvantageSpec) -> torch.Tensor:
    """Which rewards reach the threshold, finite or not, compared in their own dtype."""
    threshold: float | int = spec.success_threshold
    if not rewards.dtype.is_floating_point:
        # Integers are compared as such; no reward is beyond these bounds. In 64 bits: a narrower
        # dtype would take a threshold that it cannot hold for another (-1 for 255 in uint8).
        threshold = math.ceil(min(max(threshold, -(2.0**62)), 2.0**62))
        rewards = rewards.long()
    return rewards >= threshold


def _as_successes(groups: GroupInputs, spec: AdvantageSpec) -> GroupInputs:
    """Groups whose rewards are 1 for a success and 0 else, or as they were where not finite."""
    rewards = groups.rewards
    success = groups.success
    if success is None:
        success = successes_of(rewards, spec)
    dtype = torch.float64 if groups.wide else torch.float32
    rewards = success.to(dtype).where(rewards.isfinite(), float("nan"))
    return replaced(groups, rewards=rewards, success=success)


def weight_of_rows(
    weight: torch.Tensor, n_rows: int, group_size: int, group_ids: torch.Tensor | None
) -> torch.Tensor:
    """Weights [B] of rows from those of rows [B] or of groups [Q]; nothing waits.

    Of groups by id there have to be as many as there are ids, ascending; else all are NaN.
    """
    n = weight.shape[0]
    if n == n_rows:
        return weight
    if group_ids is None:
        return weight.repeat_interleave(group_size)
    index = order_by_group(group_ids)[2]
    return weight[index.clamp(max=n - 1)].where(index.amax() == n - 1, float("nan"))


def warn_of_single() -> None:
    """Say, once in a process, that groups of one sequence teach nothing."""
    global _has_warned_of_single
    if _has_warned_of_single or torch.compiler.is_compiling():
        return
    _has_warned_of_single = True
    warnings.warn(
        "group_size: expected at least 2, got 1. Every estimator takes its baseline from the other "
        "sequences of a group, so all advantages are 0 and nothing is learned from these rewards.",
        stacklevel=4,
    )


def batch_deviation(rewards: torch.Tensor, std_correction: int, dtype: torch.dtype) -> torch.Tensor:
    """Standard deviation of all finite rewards, in units of the largest, and that unit: [2].

    0 of fewer than two. By a few torch operations before the launch: every group's advantages need
    this number of the whole batch first, and no program of a launch can wait for all others.
    """
    # In ascending order, so that the order of the rows does not show.
    wide = rewards.to(accumulator_dtype(rewards.device)).sort().values
    finite = wide.isfinite()
    count = finite.sum().clamp(min=1)
    # Squares of the largest numbers are none.
    size = wide.where(finite, 0.0).abs().amax()
    scaled = (wide / size.where(size > 0, 1.0)).where(finite, 0.0)
    # Twice: the mean of large rewards that differ little is off by their rounding.
    for _ in range(2):
        scaled = (scaled - row_sum(scaled[None]) / count).where(finite, 0.0)
    std = (row_sum((scaled * scaled)[None]) / (count - std_correction).clamp(min=1)).sqrt()
    return torch.cat([std, size.reshape(1)]).to(dtype)


def order_by_group(group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by group without learning on the host how many groups there are.

    Args:
        group_ids: [B] integers in any order.

    Returns:
        `order` [B], the rows sorted by id; `starts` [B + 1], where each group starts in `order`,
        filled with B past the last group; `index` [B], each row's group counted from 0 by ascending
        id.
    """
    n_rows = group_ids.shape[0]
    ids, order = torch.sort(group_ids, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    rank = begins.cumsum(0) - 1
    positions = torch.arange(n_rows, device=ids.device)
    starts = torch.full((n_rows + 1,), n_rows, dtype=torch.int64, device=ids.device)
    # Rows that begin no group all write B to the last slot, which holds B already.
    starts.scatter_(0, rank.where(begins, n_rows), positions.where(begins, n_rows))
    index = torch.empty_like(rank).scatter_(0, order, rank)
    return order, starts, index


def group_metrics(table: torch.Tensor) -> list[torch.Tensor]:
    """The batch's `GROUP_METRICS`, 0-d each, from the statistics table."""
    _, _, success_ratio, certainty, count, nonfinite, factor = table.unbind(0)
    counted = count > 0
    # The mean over no group is NaN.
    n_groups = counted.sum().to(table.dtype)
    without_signal = (factor == 0) & (count + nonfinite > 0)
    return [
        success_ratio.where(counted, 0.0).sum() / n_groups,
        certainty.where(counted, 0.0).sum() / n_groups,
        without_signal.sum().to(table.dtype),
        nonfinite.sum(),
        n_groups,
    ]


def group_summary(table: torch.Tensor) -> torch.Tensor:
    """The batch's `GROUP_METRICS`, and 1 if it has signal but no success, else 0: [6]."""
    metrics = group_metrics(table)
    success_ratio, _, without_signal, _, n_groups = metrics
    never = (success_ratio == 0) & (without_signal < n_groups)
    return torch.stack([*metrics, never.to(table.dtype)])
