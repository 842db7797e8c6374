"""Group statistics and mixed advantage (SPEC section 1) on torch tensors."""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels import config
from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import formula
from mapo_kernels.eager.sums import accumulator_dtype, row_sum
from mapo_kernels.groups import order_by_group
from mapo_kernels.spec import AdvantageSpec


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
    n_rows, size = groups.rewards.shape[0], groups.group_size
    step = max(1, config.EAGER.chunk_rewards // max(size, 1)) * size
    if groups.group_ids is not None or torch.compiler.is_compiling() or n_rows <= step:
        return _of_groups(groups, spec)
    dtype = result_dtype(groups.rewards)
    advantages = groups.rewards.new_empty(n_rows, dtype=dtype)
    table = groups.rewards.new_empty((7, n_rows // size), dtype=dtype)
    for first in range(0, n_rows, step):
        r, q = slice(first, first + step), slice(first // size, (first + step) // size)
        success = None if groups.success is None else groups.success[r]
        some = replaced(groups, rewards=groups.rewards[r], success=success)
        advantages[r], table[:, q] = _of_groups(some, spec)
    return advantages, table


def _extremes(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Lowest and highest of each row of a table on a CPU; None where one needs more care.

    That is where it is not finite, or so large that its square may not be.
    """
    if torch.compiler.is_compiling() or rewards.device.type != "cpu" or rewards.shape[0] == 0:
        return None
    lowest, highest = torch.aminmax(rewards, dim=1)
    large = _large_rewards(rewards.dtype)[0]
    # A NaN is within no bounds.
    return (lowest, highest) if lowest.amin() >= -large and highest.amax() <= large else None


def _of_groups(groups: GroupInputs, spec: AdvantageSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """What `eager_advantages` returns, of groups that fit the cache together."""
    by_group = _Groups(groups)
    reduce, spread = by_group.reduce, by_group.spread
    dtype = result_dtype(groups.rewards)
    given = groups.rewards.reshape(by_group.shape)
    rewards = given.to(dtype)
    # In the rewards' own dtype: a float32 reward of 0.9 passes a threshold of 0.9.
    success = given >= spec.success_threshold if groups.success is None else groups.success
    success = success.reshape(by_group.shape)
    extremes = _extremes(rewards) if groups.group_ids is None else None
    finite = None
    if extremes is not None:
        lowest, highest = extremes
        count = torch.full_like(lowest, groups.group_size)
        nonfinite = torch.zeros_like(lowest)
        successes = success.sum(1).to(dtype)
        unit: Any = 1.0
        above = rewards - spread(lowest)
    else:
        inf = float("inf")
        finite = rewards.abs() < inf
        count = reduce(finite.to(dtype), "sum")
        nonfinite = reduce((~finite).to(dtype), "sum")
        successes = reduce((finite & success).to(dtype), "sum")
        lowest = reduce(rewards.where(finite, inf), "amin", inf).where(count > 0, 0.0)
        highest = reduce(rewards.where(finite, -inf), "amax", -inf).where(count > 0, 0.0)
        unit = formula.reward_unit(lowest, highest, *_large_rewards(dtype))
        lowest, highest = lowest * unit, highest * unit
        above = (rewards * spread(unit) - spread(lowest)).where(finite, 0.0)
    offset = reduce(above, "sum") / count.clamp(min=1.0)
    deviation = above - spread(offset)
    if finite is not None:
        deviation = deviation.where(finite, 0.0)
    mean = lowest + offset
    factor, std, success_ratio, certainty = formula.group_advantage(
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
    if finite is None and factor.abs().amax() < float("inf"):
        # Of finite numbers: where one is 0 so is the product, if for its sign.
        advantages = deviation.mul_(spread(factor)).clamp_(-limit, limit).add_(0.0)
    else:
        finite = torch.ones_like(success) if finite is None else finite
        advantages = formula.row_advantage(deviation, finite, spread(factor), limit)
    table = [mean / unit, std, success_ratio, certainty, count, nonfinite, factor]
    return advantages.reshape(-1), torch.stack(table)
