"""Group statistics and mixed advantage (SPEC section 1): one launch, and its eager twin.

A group is found in one of three layouts: `contiguous` (rows k G to (k + 1) G), `match` (all rows
are scanned for an equal id; right for a batch of a few thousand) and `order` (ids were sorted; a
permutation and the groups' starts say where each group's rows lie). None of them waits on the host.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch

from mapo_kernels import twin
from mapo_kernels._triton import on_device_of, registers, triton
from mapo_kernels.advantages_kernel import Rewards, advantages_kernel
from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.spec import AdvantageSpec
from mapo_kernels.sums import accumulator_dtype, row_sum

# Above it, scanning every id for every row costs more than sorting.
MATCH_LIMIT = 4096
_TILE_ELEMENTS = 1024


class GroupStats(NamedTuple):
    """Statistics per group, [Q] tensors: groups by position, or by ascending id for `group_ids`.

    Ids of uint64 from 2^63 on come first, as the negative numbers that their bits are in int64.

    Attributes:
        mean: mu, mean of the group's finite rewards.
        std: sigma, with the correction of the spec.
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
    """

    advantages: torch.Tensor
    metrics: dict[str, torch.Tensor] = {}  # noqa: RUF012  never written to

    def of_rows(self, rows: Any, device: torch.device | None = None) -> Signal:
        """The same of some of the sequences (or tokens), with the metrics of all groups."""
        values = {k: x.to(device or x.device) for k, x in self.metrics.items()}
        return Signal(self.advantages[rows].to(device or self.advantages.device), values)


_has_warned = False


def never_successful(
    spec: AdvantageSpec, success: torch.Tensor | None, metrics: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Whether a batch has signal but no success, [] bool; None where the threshold decides nothing.

    `metrics` are those about its groups.
    """
    if success is not None or spec.certainty_mode == "fixed" or not metrics:
        return None
    has_signal = metrics["zero_advantage_groups"] < metrics["active_groups"]
    return (metrics["success_ratio_mean"] == 0) & has_signal


def warn_of_threshold(spec: AdvantageSpec) -> None:
    """Say, once in a process, that no reward of a batch reached the threshold."""
    global _has_warned
    if _has_warned or spec.certainty_mode == "fixed":
        return
    _has_warned = True
    warnings.warn(
        f"success_threshold: no reward of this batch reached {spec.success_threshold:g}, though "
        f"rewards differ. Every group then counts as failed, its certainty lambda is that of p = 0 "
        f"(1 in the paper), and MAPO is the percent deviation alone. If some of these sequences "
        f"did succeed, lower success_threshold, or pass success= (in MAPOConfig: success_reward).",
        stacklevel=3,
    )


def forget_warnings() -> None:
    """Warn again of what was warned of already: for tests."""
    global _has_warned
    _has_warned = False


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
    """
    rewards, success = groups.rewards, groups.success
    if groups.wide or rewards.dtype in _NARROW:
        return groups
    if success is None:
        threshold: float | int = spec.success_threshold
        if not rewards.dtype.is_floating_point:
            # Integers are compared as such; no reward is beyond these bounds.
            threshold = math.ceil(min(max(threshold, -(2.0**62)), 2.0**62))
        success = rewards >= threshold
    if rewards.dtype == torch.float64:
        # What is finite stays so.
        limit = torch.finfo(torch.float32).max
        rewards = rewards.clamp(-limit, limit).where(rewards.isfinite(), rewards)
    return replaced(groups, rewards=rewards.to(torch.float32), success=success)


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


def empty_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised advantages [B] and statistics table [7, Q] ([0, Q] if not wanted)."""
    n_rows = groups.rewards.shape[0]
    n_groups = n_rows // groups.group_size if groups.group_ids is None else n_rows
    shape = (7 if want_stats else 0, n_groups)
    return (
        groups.rewards.new_empty(n_rows, dtype=torch.float32),
        groups.rewards.new_empty(shape, dtype=torch.float32),
    )


def launch_advantages(
    groups: GroupInputs,
    spec: AdvantageSpec,
    want_stats: bool,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """What `eager_advantages` computes, in one launch (ids of a large batch are sorted before)."""
    n_rows = groups.rewards.shape[0]
    ids = order = starts = None
    if groups.group_ids is None:
        n_groups = n_rows // groups.group_size
        block_g = triton.next_power_of_2(groups.group_size)
        tile = max(1, _TILE_ELEMENTS // block_g)
    elif n_rows <= MATCH_LIMIT and not want_stats:
        n_groups, tile, block_g = n_rows, 1, 1024
        ids = groups.group_ids.contiguous()
    else:
        n_groups, tile, block_g = n_rows, 16, 64
        order, starts, _ = order_by_group(groups.group_ids)
    advantages, table = out
    with on_device_of(advantages):
        advantages_kernel[(triton.cdiv(n_groups, tile),)](
            Rewards(
                groups.rewards.contiguous(),
                None if groups.success is None else groups.success.contiguous(),
                ids,
                order,
            ),
            starts,
            advantages,
            table if want_stats else None,
            n_groups,
            groups.group_size,
            spec.numbers,
            GROUP=spec.kind,
            TILE=tile,
            BLOCK_G=block_g,
            num_warps=min(16, max(4, tile * block_g // 128)),
            # Up to 512 threads have them; Triton 3.6 spills for an A100 at fewer.
            **registers(128),
        )


class _Groups:
    """Goes between rows and groups: contiguous groups as a table [Q, G], others by scattering."""

    def __init__(self, groups: GroupInputs) -> None:
        self._index = None
        if groups.group_ids is not None:
            self._index = order_by_group(groups.group_ids)[2]
            # Members are added by ascending reward, so that the order of the rows does not show.
            self._order = torch.argsort(groups.rewards)
        self.shape = (-1,) if self._index is not None else (-1, groups.group_size)

    def reduce(self, x: torch.Tensor, how: str, start: float = 0.0) -> torch.Tensor:
        """Reduce rows by `sum`, `amin` or `amax` to [Q], or [B] of which the last may be empty."""
        if self._index is None:
            return row_sum(x) if how == "sum" else getattr(x, how)(1)
        # Scattered values are added one after the other, which costs float32 its last digits.
        wide = x.to(accumulator_dtype(x.device))[self._order]
        found = torch.full_like(wide, start)
        return found.scatter_reduce(0, self._index[self._order], wide, how).to(x.dtype)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values of groups in a shape that broadcasts against rows."""
        return x[:, None] if self._index is None else x[self._index]


def _large_rewards(dtype: torch.dtype) -> tuple[float, float]:
    """Beyond which reward deviations are squared in which unit: see `formula.reward_unit`."""
    # Not at module level, where torch.compile takes numbers for symbols.
    return (2.0**400, 2.0**-620) if dtype == torch.float64 else (2.0**50, 2.0**-80)


def eager_advantages(groups: GroupInputs, spec: AdvantageSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and the statistics table [7, Q]: fields of `GroupStats`, then the factor.

    For group ids the table is [7, B]: groups by ascending id, empty ones last.
    """
    by_group = _Groups(groups)
    reduce, spread = by_group.reduce, by_group.spread
    dtype = result_dtype(groups.rewards)
    given = groups.rewards.reshape(by_group.shape)
    rewards = given.to(dtype)

    finite = rewards.abs() < float("inf")
    if groups.success is None:
        # In the rewards' own dtype: a float32 reward of 0.9 passes a threshold of 0.9.
        success = finite & (given >= spec.success_threshold)
    else:
        success = finite & groups.success.reshape(by_group.shape)
    inf = float("inf")
    count = reduce(finite.to(rewards.dtype), "sum")
    nonfinite = reduce((~finite).to(rewards.dtype), "sum")
    successes = reduce(success.to(rewards.dtype), "sum")
    lowest = reduce(rewards.where(finite, inf), "amin", inf).where(count > 0, 0.0)
    highest = reduce(rewards.where(finite, -inf), "amax", -inf).where(count > 0, 0.0)
    unit = twin.reward_unit(lowest, highest, *_large_rewards(dtype))
    lowest, highest = lowest * unit, highest * unit
    above = (rewards * spread(unit) - spread(lowest)).where(finite, 0.0)
    offset = reduce(above, "sum") / count.clamp(min=1.0)
    deviation = (above - spread(offset)).where(finite, 0.0)
    mean = lowest + offset
    factor, std, success_ratio, certainty = twin.group_advantage(
        count,
        lowest,
        highest,
        mean,
        reduce(deviation * deviation, "sum"),
        successes,
        unit,
        spec.numbers,
        spec.kind,
    )
    limit = torch.finfo(dtype).max if spec.max_abs is None else spec.max_abs
    advantages = twin.row_advantage(deviation, finite, spread(factor), limit)
    table = [mean / unit, std, success_ratio, certainty, count, nonfinite, factor]
    return advantages.reshape(-1), torch.stack(table)


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
